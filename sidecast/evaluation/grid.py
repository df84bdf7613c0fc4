"""From a few lists to the members of a farm: arms, learning rates, betas, schedules, lengths and seeds.

An *arm* is what is compared: an optimizer, a method and their fixed options. Learning rate and b1 are tuned within
every arm, over the same grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sidecast.assignments import parse_assignment
from sidecast.errors import ConfigError
from sidecast.evaluation.farm import group_key
from sidecast.evaluation.methods.registry import with_defaults
from sidecast.evaluation.schedules import Schedule
from sidecast.evaluation.settings import MemberSettings, MethodSettings, OptimizerSettings


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is compared.

    Attributes:
        name: Its name in tables.
        optimizer: Name of its optimizer.
        optimizer_options: Of a library's optimizer.
        method: What is done besides.
    """

    name: str
    optimizer: str = "adamw"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    method: MethodSettings = field(default_factory=MethodSettings)


def _jump(name: str, **options: Any) -> Arm:
    return Arm(name=name, method=MethodSettings(name="jump", options={"predictor": name, **options}))


BASELINE = "adamw"
ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(name=BASELINE),
        Arm(name="push", method=MethodSettings(name="push")),
        Arm(name="predicted-push", method=MethodSettings(name="predicted-push")),
        Arm(name="outer-nesterov", method=MethodSettings(name="outer-nesterov")),
        _jump("linear", horizon=3),
        _jump("rank1", horizon=3),
        _jump("outer_nesterov"),
        _jump("wnn"),
        _jump("wnn_plus"),
        _jump("nino"),
        Arm(name="schedule-free", optimizer="schedule-free"),
        Arm(name="ademamix", optimizer="ademamix"),
        Arm(name="muon", optimizer="muon"),
        Arm(name="lookahead", optimizer="lookahead"),
    )
}
_PLAIN_FIELDS = ("b2", "eps", "weight_decay", "max_grad_norm")


def parse_arm(text: str) -> Arm:
    """An arm from ``NAME`` or ``NAME:OPTION=VALUE,...``; a value is JSON, or else a word.

    Raises:
        ConfigError: There is no arm of that name, or an option has no value.
    """
    name, _, rest = text.partition(":")
    if name not in ARMS:
        raise ConfigError(f"method is {name!r}; allowed: {', '.join(ARMS)}")
    arm = ARMS[name]
    options = dict(_option(text, pair) for pair in rest.split(",")) if rest else {}
    if not options:
        return arm
    if arm.method.name == "none":
        return replace(arm, name=text, optimizer_options={**arm.optimizer_options, **options})
    return replace(arm, name=text, method=replace(arm.method, options={**arm.method.options, **options}))


def _option(text: str, pair: str) -> tuple[str, Any]:
    assignment = parse_assignment(pair)
    if assignment is None:
        raise ConfigError(f"method is {text!r}; NAME:OPTION=VALUE,... is needed, and {pair!r} is no OPTION=VALUE")
    return assignment


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All combinations of these lists.

    Attributes:
        tasks: Names of recipes.
        arms: What is compared.
        schedules: How the learning rate moves.
        lrs: Peak learning rates.
        b1s: Time constants of the first moment.
        lengths: Run lengths in steps of every arm.
        baseline_lengths: Further lengths of the baseline arm, which others' losses are read against.
        num_seeds: Seeds 0, 1, ...
        optimizer: What all members' optimizers have in common.
    """

    tasks: Sequence[str]
    arms: Sequence[Arm]
    schedules: Sequence[Schedule]
    lrs: Sequence[float]
    b1s: Sequence[float]
    lengths: Sequence[int]
    baseline_lengths: Sequence[int] = ()
    num_seeds: int = 8
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def members(self) -> list[MemberSettings]:
        """Every run, seed by seed, so that an unfinished farm has whole pairs."""
        members = []
        seeds = range(self.num_seeds)
        for seed, task, schedule, arm in itertools.product(seeds, self.tasks, self.schedules, self.arms):
            further = self.baseline_lengths if arm.name == BASELINE else ()
            for num_steps in dict.fromkeys([*self.lengths, *further]):
                for lr, b1 in itertools.product(self.lrs, self.b1s):
                    optimizer, options = self._optimizer(arm, lr, b1)
                    members.append(
                        MemberSettings(
                            task=task,
                            arm=arm.name,
                            seed=seed,
                            num_steps=num_steps,
                            schedule=schedule,
                            optimizer=replace(optimizer, options=options),
                            method=with_defaults(arm.method),
                        )
                    )
        return members

    def _optimizer(self, arm: Arm, lr: float, b1: float) -> tuple[OptimizerSettings, dict[str, Any]]:
        options = dict(arm.optimizer_options)
        plain = {name: options.pop(name) for name in _PLAIN_FIELDS if name in options}
        return replace(self.optimizer, name=arm.optimizer, lr=lr, b1=b1, **plain), options


def groups(members: Iterable[MemberSettings], max_members: int) -> list[list[MemberSettings]]:
    """Members that can be trained side by side, in the order of their first.

    Args:
        members: All of them.
        max_members: The most in one group.
    """
    together: dict[Any, list[MemberSettings]] = {}
    for member in members:
        together.setdefault(group_key(member), []).append(member)
    return [
        group[start : start + max_members] for group in together.values() for start in range(0, len(group), max_members)
    ]
