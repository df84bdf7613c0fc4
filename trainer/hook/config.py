"""The ``"nowcaster"`` section of a ds_config, checked and frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sidecast.errors import ConfigError
from sidecast.horizon import MAX_POWER, MIN_POWER
from sidecast.policies.push import PushConfig
from sidecast.policies.read_outs import MAX_KEEP_BEST, read_outs_of
from sidecast.trainer.hook.policies.verdicts import MIN_POINTS, is_judgeable
from sidecast.trainer.settings import read_settings, require

MAX_PORT = 65_535
MAX_CHANNELS = 16
# One chunk must pass within the time that a message may take.
MIN_MBYTES_PER_S = 1.0

JUMP_SETTINGS = (
    "predictor",
    "predictor_options",
    "context_len",
    "period_steps",
    "max_steps",
    "horizon",
    "max_weight",
    "merge",
    "moments",
    "during_decay",
    "probation_steps",
    "rollback",
    "rollback_dir",
    "acceptance_sigmas",
    "max_rollbacks",
)
"""What means nothing to a run with pushes."""


@dataclass(frozen=True, kw_only=True)
class HorizonConfig:
    """How far ahead nowcasts look."""

    schedule: Literal["constant", "power"] | None = None
    """``power`` falls from ``max`` to 1 over the run; None: ``power`` if ``max_steps`` is known, else ``constant``."""
    max: int | None = None
    """First horizon in snapshot intervals; None: the predictor's own."""
    power: float = 2.0
    """How fast the horizon falls."""


@dataclass(frozen=True, kw_only=True)
class TimeoutConfig:
    """The trainer's rungs of the timeout ladder: connect < chunk < stream (< nowcast < session, on the service)."""

    connect_s: float = 5.0
    """To reach the service once."""
    chunk_s: float = 15.0
    """For one small call, and between two messages of a stream."""
    stream_s: float = 120.0
    """For the upload or download of one rank's part of one snapshot."""


@dataclass(frozen=True, kw_only=True)
class NowcasterConfig:
    """All settings of the hook. Steps are optimizer steps that were applied."""

    enabled: bool = True
    """False: the engine is returned untouched."""
    endpoint: str = "127.0.0.1:50051"
    """HOST:PORT of the service."""
    require: bool = False
    """True: an unreachable service is an error at start instead of a warning."""
    policy: Literal["jump", "push"] = "jump"
    """``jump``: rare and far, each on probation. ``push``: every ``push.interval_steps`` a small addition along a long
    average of the run's own motion, none of them judged alone; a rise of the loss ends them. See pushes.md."""
    push: PushConfig = field(default_factory=PushConfig)
    """Settings of ``policy: push``."""
    read_outs: tuple[str, ...] = ()
    """Averages of the run's states that the service keeps, such as ["ema5"], to be exported at any time: ``emaP``: half
    of the weight lies on the last P percent of the steps; ``mean@STEP``, ``wsm@STEP``: from a step on. See
    read-outs.md."""
    keep_best: int = 0
    """So many of the read-outs, or of the run's own states, are kept that had the lowest losses on the service's probe
    (``sidecast serve --probe``), of whatever step, for ``sidecast export --best``."""
    run_file: str | None = None
    """File in which rank 0 leaves the run's id and secret for ``sidecast export``, for its own user alone."""
    predictor: str = "linear"
    """Name of the predictor."""
    predictor_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the predictor, for example {"upd_scale": 0.5, "device": "cuda"}; see predictors.md."""
    context_len: int = 5
    """States per nowcast."""
    period_steps: int = 1000
    """Steps between nowcasts; a multiple of ``context_len``."""
    max_steps: int | None = None
    """Length of the run, for horizons that fall over it."""
    horizon: HorizonConfig = field(default_factory=HorizonConfig)
    """How far ahead nowcasts look."""
    mode: Literal["async", "sync"] = "async"
    """``sync`` waits for the prediction at its base step, as the paper does, and at each snapshot step until the
    snapshot before has been sent; neither while the service is away, nor over a break of the connection."""
    sync_deadline_s: float = 60.0
    """``sync`` mode: go on without the prediction, or without the snapshot, after this long."""
    vote_interval_steps: int | None = None
    """Steps between votes; None: a twentieth of the snapshot interval, with pushes a fourth, at least 1."""
    vote_lag_steps: int = 1
    """Steps from launching a vote to reading it; at most ``vote_interval_steps``; 0 blocks."""
    max_staleness_steps: int | None = None
    """A prediction whose base is older is dropped; None: just below the snapshot interval, which is also the most."""
    max_weight: float = 1.0
    """Fraction of the predicted jump that is applied at staleness 0."""
    max_relative_norm: float = 0.5
    """Largest accepted ||jump|| / ||parameters||."""
    merge: Literal["age_weighted", "replace", "add"] = "age_weighted"
    """How a jump d steps after its base, with a horizon of h steps, meets what training did since: ``age_weighted``:
    now + max_weight * (1 - d/h) * jump; ``add``: now + max_weight * jump, whatever its age; ``replace``: base +
    max_weight * jump, which drops those d steps and keeps a copy of the base (4 bytes per owned parameter)."""
    moments: Literal["keep", "reset", "scale"] = "keep"
    """What a jump does to the optimizer's moments: ``keep``: nothing; ``reset``: they and the step counters are as
    before the first step, where it is known what that is; ``scale``: the first moment (momentum) is multiplied by
    1 - weight, the share of the predicted way that the jump has not gone. A rollback restores them in any case."""
    during_decay: Literal["scale", "suspend", "allow"] = "scale"
    """While the learning rate is below its highest value at the window's snapshots: ``scale`` multiplies the weight by
    the part that is left, ``suspend`` applies nothing, ``allow`` ignores it, and is all that is allowed with an
    optimizer without a learning rate that is a number. Warm-up is no decay."""
    probation_steps: int | None = None
    """After so many steps a jump is judged; None: half the period, or as long as a verdict takes; 0: never. A verdict
    takes the losses of 4 votes before the jump, and of 4 in the second half of these steps."""
    rollback: Literal["host", "disk", "off"] = "host"
    """Where the copy for undoing a jump on probation is kept (12 bytes per owned parameter with Adam); ``disk``: in a
    file in ``rollback_dir``, so that a jump may wait for the disk; ``off``: jumps are neither judged nor undone."""
    rollback_dir: str | None = None
    """Folder for ``rollback: disk``, on a disk local to the rank."""
    max_host_memory_gib: float | None = None
    """Most memory that the hook may take on one host, all its ranks together; null: what is available."""
    acceptance_sigmas: float = 3.0
    """A jump is undone if the loss after it is above the trend before it by so many standard errors."""
    max_rollbacks: int = 2
    """So many rollbacks in a row suspend jumps for the rest of the run."""
    record_dir: str | None = None
    """Folder for the apply log and the applied deltas, from which the run can be replayed without a service."""
    replay_dir: str | None = None
    """Replay that folder's jumps instead of asking a service."""
    metrics_port: int | None = None
    """Prometheus port of local rank 0, the next one for local rank 1, and so on; 0 picks free ones; None: none."""
    run_name: str = "default"
    """Label of this run in its metrics."""
    token_file: str | None = None
    """File with the service's shared secret."""
    tls_ca: str | None = None
    """PEM certificate of the authority that signed the service's; needed off loopback."""
    tls_cert: str | None = None
    """PEM certificate that the service is shown, where it asks for one (``sidecast serve --tls-client-ca``)."""
    tls_key: str | None = None
    """PEM private key of ``tls_cert``."""
    wire_dtype: Literal["fp32", "bf16_delta"] = "fp32"
    """``bf16_delta``: after a first snapshot in fp32, changes travel in bf16, rounding errors in the next one, and
    predictions too: about half the traffic, for 4 bytes of memory per uploaded parameter."""
    shared_memory: Literal["auto", "off"] = "auto"
    """``auto``: a service of the same user on the same host maps the courier's buffers, and no bytes travel;
    ``wire_dtype`` then only rounds predictions."""
    channels: int = 1
    """Connections that share a transfer; more help where one cannot fill the network."""
    max_mbytes_per_s: float | None = None
    """Most megabytes (10^6 bytes) per second that a rank sends and receives; null: no limit."""
    timeouts: TimeoutConfig = field(default_factory=TimeoutConfig)
    """The timeout ladder."""

    @property
    def interval_steps(self) -> int:
        """Steps between snapshots."""
        return self.push.interval_steps if self.policy == "push" else self.period_steps // self.context_len

    @property
    def nowcast_interval_steps(self) -> int:
        """Steps between nowcasts: with pushes one is made from every snapshot."""
        return self.push.interval_steps if self.policy == "push" else self.period_steps

    @property
    def nowcast_interval_setting(self) -> str:
        """The setting that says how often there is a nowcast."""
        return "nowcaster.push.interval_steps" if self.policy == "push" else "nowcaster.period_steps"

    @property
    def num_slots(self) -> int:
        """Snapshots that a rank may have staged and not yet sent."""
        # In sync mode one: a rank that is two ahead of another has the service give up that one's snapshot, and a run
        # that waits for its uploads in any case gains nothing from a second slot.
        # With pushes one, too: a lost snapshot costs one of many pushes, and a service keeps fewer vectors.
        return 1 if self.mode == "sync" or self.policy == "push" else 2

    @property
    def resolved_vote_interval_steps(self) -> int:
        if self.vote_interval_steps is not None:
            return self.vote_interval_steps
        return max(1, self.interval_steps // (4 if self.policy == "push" else 20))

    @property
    def resolved_max_staleness_steps(self) -> int:
        return self.interval_steps - 1 if self.max_staleness_steps is None else self.max_staleness_steps

    @property
    def resolved_probation_steps(self) -> int:
        if self.probation_steps is not None:
            return self.probation_steps
        half = self.period_steps // 2
        return next((steps for steps in range(half, self.period_steps) if self._is_judgeable(steps)), half)

    def _is_judgeable(self, probation_steps: int) -> bool:
        return is_judgeable(
            probation_steps, self.resolved_vote_interval_steps, self.vote_lag_steps, at_any_step=self.mode == "sync"
        )

    def __post_init__(self) -> None:
        def check(name: str, value: object, is_allowed: bool, allowed: str) -> None:
            require(f"nowcaster.{name}", value, is_allowed, allowed)

        check("context_len", self.context_len, self.context_len >= 2, "2 or more")
        check("period_steps", self.period_steps, self.period_steps >= self.context_len, "context_len or more")
        check(
            "period_steps",
            self.period_steps,
            self.period_steps % self.context_len == 0,
            f"a multiple of context_len ({self.context_len})",
        )
        check("max_steps", self.max_steps, self.max_steps is None or self.max_steps > 0, "a positive number or null")
        check("horizon.max", self.horizon.max, self.horizon.max is None or self.horizon.max >= 1, "1 or more, or null")
        check(
            "horizon.power",
            self.horizon.power,
            MIN_POWER <= self.horizon.power <= MAX_POWER,
            f"{MIN_POWER} to {MAX_POWER}",
        )
        if self.horizon.schedule == "power":
            check(
                "max_steps", self.max_steps, self.max_steps is not None, "a number, since horizon.schedule is 'power'"
            )
        self._check_policy(check)
        votes = self.resolved_vote_interval_steps
        check("vote_interval_steps", votes, 1 <= votes <= self.interval_steps, f"1 to {self.interval_steps}")
        check("vote_lag_steps", self.vote_lag_steps, 0 <= self.vote_lag_steps <= votes, f"0 to {votes}")
        stale = self.resolved_max_staleness_steps
        if self.mode == "async":
            # The first vote after a base step may be as far away as two votes are.
            earliest = votes + self.vote_lag_steps
            check(
                "vote_interval_steps",
                votes,
                earliest <= stale,
                f"so many that vote_interval_steps + vote_lag_steps ({earliest}) is at most max_staleness_steps "
                f"({stale}): no prediction could ever be applied (or mode 'sync')",
            )
        # A later jump would fall behind the next window's first snapshot and cost that window.
        check("max_staleness_steps", stale, 0 <= stale < self.interval_steps, f"0 to {self.interval_steps - 1}")
        probation = self.resolved_probation_steps
        check("probation_steps", probation, 0 <= probation < self.period_steps, f"0 to {self.period_steps - 1}")
        if self.policy == "jump" and self.rollback != "off" and probation > 0:
            longer = range(probation, self.period_steps)
            enough = next((steps for steps in longer if self._is_judgeable(steps)), None)
            check(
                "probation_steps",
                probation,
                self._is_judgeable(probation),
                f"0 (jumps are never judged), or so many that {MIN_POINTS} votes before a jump and {MIN_POINTS} in the "
                f"second half of these steps bring losses to judge it by; with vote_interval_steps {votes} and "
                f"vote_lag_steps {self.vote_lag_steps} the next such number "
                + (f"is {enough}" if enough else "is not below period_steps, so lower those or raise period_steps"),
            )
        check("max_weight", self.max_weight, 0 < self.max_weight <= 1, "more than 0, at most 1")
        check("max_relative_norm", self.max_relative_norm, self.max_relative_norm > 0, "a positive number")
        is_dir_named = (self.rollback_dir is not None) == (self.rollback == "disk")
        check("rollback_dir", self.rollback_dir, is_dir_named, "a folder if rollback is 'disk', else null")
        memory = self.max_host_memory_gib
        check("max_host_memory_gib", memory, memory is None or memory > 0, "a positive number, or null")
        check("acceptance_sigmas", self.acceptance_sigmas, self.acceptance_sigmas > 0, "a positive number")
        check("max_rollbacks", self.max_rollbacks, self.max_rollbacks >= 1, "1 or more")
        check("sync_deadline_s", self.sync_deadline_s, self.sync_deadline_s > 0, "a positive number")
        check("channels", self.channels, 1 <= self.channels <= MAX_CHANNELS, f"1 to {MAX_CHANNELS}")
        rate = self.max_mbytes_per_s
        check(
            "max_mbytes_per_s", rate, rate is None or rate >= MIN_MBYTES_PER_S, f"{MIN_MBYTES_PER_S} or more, or null"
        )
        host, _, port = self.endpoint.rpartition(":")
        is_endpoint = host != "" and port.isdecimal() and 0 < int(port) <= MAX_PORT
        check("endpoint", self.endpoint, is_endpoint, "HOST:PORT")
        is_port = self.metrics_port is None or 0 <= self.metrics_port <= MAX_PORT
        check("metrics_port", self.metrics_port, is_port, f"0 to {MAX_PORT}, or null")
        # The courier reads them; here their absence is one line instead of a courier that dies again and again.
        for name in ("token_file", "tls_ca", "tls_cert", "tls_key"):
            path = getattr(self, name)
            check(name, path, path is None or Path(path).is_file(), "an existing file")
        check("tls_key", self.tls_key, (self.tls_key is None) == (self.tls_cert is None), "a file if tls_cert is one")
        is_encrypted = self.tls_cert is None or self.tls_ca is not None
        check("tls_ca", self.tls_ca, is_encrypted, "an existing file, since tls_cert is set")
        try:
            read_outs_of(self.read_outs)
        except ConfigError as error:
            raise ConfigError(f"nowcaster.read_outs: {error}") from None
        best = self.keep_best
        is_kept = best == 0 or (0 < best <= MAX_KEEP_BEST and bool(self.read_outs))
        check("keep_best", best, is_kept, f"0 to {MAX_KEEP_BEST}, and 0 without read_outs")
        is_folder = self.record_dir is None or not Path(self.record_dir).exists() or Path(self.record_dir).is_dir()
        check("record_dir", self.record_dir, is_folder, "a folder")
        ladder = self.timeouts
        check(
            "timeouts",
            dataclasses.asdict(ladder),
            0 < ladder.connect_s < ladder.chunk_s < ladder.stream_s,
            "0 < connect_s < chunk_s < stream_s",
        )
        if self.replay_dir is not None:
            check("replay_dir", self.replay_dir, Path(self.replay_dir).is_dir(), "an existing folder")
            check("record_dir", self.record_dir, self.record_dir is None, "null, since replay_dir is set")
            check("run_file", self.run_file, self.run_file is None, "null, since replay_dir is set")
            check("read_outs", self.read_outs, not self.read_outs, "none, since replay_dir is set")

    def _check_policy(self, check: Callable[[str, object, bool, str], None]) -> None:
        """Refuses settings that mean nothing under the policy: whoever made them expects something of them."""
        defaults = {item.name: item for item in dataclasses.fields(self)}
        for name in JUMP_SETTINGS if self.policy == "push" else ("push",):
            item = defaults[name]
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            require_unset(name, getattr(self, name), default, self.policy)
        is_whole = self.wire_dtype == "fp32" or self.policy == "jump"
        check("wire_dtype", self.wire_dtype, is_whole, "'fp32' with policy 'push'")


def require_unset(name: str, value: object, default: object, policy: str) -> None:
    """Refuses a setting that means nothing under a policy.

    Args:
        name: The setting's, within the section.
        value: What it is.
        default: What it is if nobody has set it.
        policy: Of the run.

    Raises:
        ConfigError: Somebody has.
    """
    require(f"nowcaster.{name}", value, value == default, f"nothing with policy {policy!r}")


def parse_section(section: Mapping[str, Any]) -> NowcasterConfig:
    """Reads the section.

    Raises:
        ConfigError: An unknown key, or a value of the wrong kind or out of range, named with what is allowed.
    """
    return read_settings(NowcasterConfig, section, "nowcaster")
