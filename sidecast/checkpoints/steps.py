"""Which steps checkpoints are of: what their files record, and what their names say.

In this order: the file itself (DeepSpeed), ``trainer_state.json`` beside the weights, the file's metadata, the name of
the checkpoint with a word such as ``step`` in it, the name of the folder that it lies in, and the digits that its name
ends in. What has none of these is of an unknown step.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from sidecast.checkpoints.checkpoint import Checkpoint, CheckpointFormat, read_json_object, resolved
from sidecast.checkpoints.fields import Field
from sidecast.errors import ConfigError

TRAINER_STATE_FILE = "trainer_state.json"
_METADATA_KEYS = ("global_step", "step")

# Names that every checkpoint's weights have: the folder's name tells one from another.
_GENERAL_NAMES = frozenset(
    {"model", "adapter_model", "pytorch_model", "diffusion_pytorch_model", "pytorch_lora_weights", "weights"}
)
_SUFFIXES = re.compile(r"\.(?:safetensors|ckpt|pt|pth|bin)$")
_NUMBER = r"[-_=]?([0-9]+(?:\.[0-9]+)?)([kmbt])?(?![a-z0-9]|\.[0-9])"
# The first that a name has counts: epoch=1-step=100 is of step 100, step1000-tokens4B of step 1000.
_WORDS = (
    ("step", re.compile(rf"(?:^|[^a-z])(?:global[-_]?)?steps?{_NUMBER}", re.IGNORECASE)),
    ("step", re.compile(rf"(?:^|[^a-z])(?:iter(?:ation)?s?|updates?|ba){_NUMBER}", re.IGNORECASE)),
    ("step", re.compile(rf"(?:^|[^a-z])(?:checkpoint|ckpt){_NUMBER}", re.IGNORECASE)),
    ("token", re.compile(rf"(?:^|[^a-z])tokens?{_NUMBER}", re.IGNORECASE)),
    ("epoch", re.compile(rf"(?:^|[^a-z])(?:epochs?|ep){_NUMBER}", re.IGNORECASE)),
)
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# Digits after a decimal point, or after the v of a version, are none.
_LAST_DIGITS = re.compile(r"(?:^|[^0-9.vV])([0-9]+)$")
_NO_STEPS = re.compile(
    r"^(?:[0-9a-f]{40}|[0-9a-f]{64})$"  # a commit, as in the Hugging Face cache
    r"|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"  # a UUID
    r"|[0-9]{4}-[0-9]{2}-[0-9]{2}|(?:^|[^0-9])[0-9]{8}[-_T]?[0-9]{6}(?:$|[^0-9])"  # a date
    r"|-[0-9]{5}-of-[0-9]{5}$",  # a shard
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """How far training was.

    Attributes:
        number: Of steps, or of what the unit says.
        unit: ``step``, ``token`` or ``epoch``.
        source: What says so, for messages.
        is_sure: False for digits that a name merely ends in.
        is_exact: False for a rounded number, such as 50k.
    """

    number: int
    unit: str = "step"
    source: str
    is_sure: bool = True
    is_exact: bool = True


def known_steps(checkpoints: Sequence[Checkpoint], given: Sequence[int] | None = None) -> list[Step | None]:
    """The step of each checkpoint, all of one unit; None where it is unknown.

    Args:
        checkpoints: As the user gave them.
        given: The steps that the user says they are of, in place of all else.

    Raises:
        ConfigError: What records a step is malformed, two records contradict each other, or there are more or fewer
            given steps than checkpoints.
    """
    if given is not None:
        if len(given) != len(checkpoints):
            raise ConfigError(f"--steps names {len(given)} steps for {len(checkpoints)} checkpoints; give one for each")
        return [Step(number=number, source="--steps") for number in given]
    folders = [_absolute(checkpoint.path).parent for checkpoint in checkpoints]
    claims = [
        _claims(checkpoint, tells_parent=folders.count(folder) == 1)
        for checkpoint, folder in zip(checkpoints, folders, strict=True)
    ]
    # Digits count only where there is nothing better for any of them, and so does each unit.
    for is_sure, unit in ((True, "step"), (True, "token"), (True, "epoch"), (False, "step")):
        found = [_first(of_one, is_sure, unit) for of_one in claims]
        if any(step is not None for step in found):
            return found
    return [None] * len(checkpoints)


def _first(claims: Sequence[Step], is_sure: bool, unit: str) -> Step | None:
    return next((claim for claim in claims if claim.is_sure is is_sure and claim.unit == unit), None)


def _claims(checkpoint: Checkpoint, *, tells_parent: bool) -> list[Step]:
    """Everything that speaks of a checkpoint's step, the most trustworthy first."""
    path = _absolute(checkpoint.path)
    claims = list(_recorded(checkpoint, path)) + list(_named(checkpoint, path, tells_parent))
    if not claims and resolved(path) != path:
        # A link such as "latest" says nothing; what it leads to may.
        claims = list(_named(checkpoint, resolved(path), tells_parent))
    exact = [claim for claim in claims if claim.is_sure and claim.is_exact and claim.unit == "step"]
    for claim in exact[1:]:
        if claim.number != exact[0].number:
            raise ConfigError(
                f"{checkpoint.path} is of step {exact[0].number} by {exact[0].source}, but of step {claim.number} by "
                f"{claim.source}; name it for the step that it is of, or say the steps of all with --steps"
            )
    if not any(claim.is_sure for claim in claims):
        for key in _METADATA_KEYS:
            if checkpoint.metadata.get(key, "").isdecimal() and len(checkpoint.metadata[key]) < 20:
                claims.insert(0, Step(number=int(checkpoint.metadata[key]), source=f"its metadata's {key!r}"))
                break
    return claims


def _recorded(checkpoint: Checkpoint, path: Path) -> Iterator[Step]:
    if checkpoint.step is not None:
        yield Step(number=checkpoint.step, source="what DeepSpeed recorded")
    state = (path if path.is_dir() else path.parent) / TRAINER_STATE_FILE
    is_beside = checkpoint.format is not CheckpointFormat.DEEPSPEED and (path.is_dir() or _is_general(path))
    if is_beside and state.is_file():
        step = Field(state, "", read_json_object(state)).get("global_step")
        if not step.is_absent:
            yield Step(number=step.count(), source=TRAINER_STATE_FILE)


def _named(checkpoint: Checkpoint, path: Path, tells_parent: bool) -> Iterator[Step]:
    if checkpoint.format is CheckpointFormat.DEEPSPEED and checkpoint.step is not None:
        # Other tags are free, and may count something else.
        if re.fullmatch(r"global_step[0-9]+", path.name):
            yield from _of_name(path.name)
        return
    if not path.is_dir() and _is_general(path):
        yield from _of_name(path.parent.name)
        return
    own = list(_of_name(path.name))
    if tells_parent and not any(step.is_sure for step in own):
        yield from (step for step in _of_name(path.parent.name) if step.is_sure)
    yield from own


def _of_name(name: str) -> Iterator[Step]:
    """What a name says: at most one step, by the first word that it has, or else by its last digits."""
    bare = _SUFFIXES.sub("", name)
    source = f"the name {name!r}"
    for unit, pattern in _WORDS:
        for digits, suffix in reversed(pattern.findall(bare)):
            number = Decimal(digits) * _MULTIPLES[suffix.lower()]
            if number == int(number):
                in_tokens = suffix.lower() in ("b", "t")
                yield Step(number=int(number), unit="token" if in_tokens else unit, source=source, is_exact=not suffix)
                return
    match = _LAST_DIGITS.search(bare)
    if match is not None and _NO_STEPS.search(bare) is None:
        yield Step(number=int(match[1]), source=f"the last digits of {source}", is_sure=False)


def _is_general(path: Path) -> bool:
    return path.name.partition(".")[0] in _GENERAL_NAMES


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
