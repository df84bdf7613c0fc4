"""Read-outs: averages of the states that a run goes through, which are ahead of the run's own weights.

A read-out says which share of its weight lies on the steps up to ``x`` once it is of step ``s``: ``(x / s) ** power``,
counted from a step on. All of them need one vector and no horizon: a new state comes in as the share of the steps since
the one before it, and what was there keeps its proportions.

- ``ema5``: half of the weight lies on the last 5 % of the steps so far, at any time.
- ``mean@2000``: the plain mean from step 2,000 on.
- ``wsm@2000``: what a decay of the learning rate by 1 - sqrt, from step 2,000 to now, would have made of the same
  updates (warm-up, stable and merge: a decay's weights say how much every state counts).

Source: WSM (arXiv:2507.17634) for states instead of a decay; the power laws are ours.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidecast.errors import ConfigError, shown

MAX_READ_OUTS = 8
"""Of one run: each is a vector."""
MAX_KEEP_BEST = 8
"""Of a run: each of the best that are kept is a vector, too."""
MAX_EMA_PERCENT = 50.0
MIN_EMA_PERCENT = 0.1
ALLOWED = "'emaP' (P percent, 0.1 to 50), 'mean@STEP' or 'wsm@STEP', such as 'ema5' or 'wsm@2000'"
_EMA = re.compile(r"ema([0-9]{1,2}(?:\.[0-9]{1,3})?)")
_FROM_A_STEP = re.compile(r"(mean|wsm)@(0|[1-9][0-9]{0,14})")
_POWERS = {"mean": 1.0, "wsm": 0.5}
# A few of them fit a core's cache; large enough to hide the cost of a call.
_PIECE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class ReadOut:
    """One average.

    Attributes:
        name: As the run names it.
        power: Of the share of the weight that lies on the steps up to a given one.
        start_step: States up to this step do not count.
    """

    name: str
    power: float
    start_step: int = 0

    def share(self, begin_step: int, before_step: int, step: int) -> float:
        """The weight of a new state, above 0 and at most 1; what was there is multiplied by what is left.

        Args:
            begin_step: Of the average: no state stands for steps up to this one. Where it is beyond ``start_step``, the
                weights of the steps in between are spread over all others, in proportion.
            before_step: Of the state before, at least ``begin_step``; ``begin_step`` itself if there is none.
            step: Of the new state, above ``before_step`` and ``start_step``.
        """
        begun = self._weight_up_to(begin_step, step)
        return (1.0 - self._weight_up_to(before_step, step)) / (1.0 - begun)

    def _weight_up_to(self, step: int, newest_step: int) -> float:
        return float((max(0, step - self.start_step) / (newest_step - self.start_step)) ** self.power)


RAW = ReadOut("raw", math.inf)
"""Not a read-out that a run can name: all of the weight lies on the newest state."""


def read_out_of(name: str) -> ReadOut:
    """The read-out of a name.

    Raises:
        ConfigError: There is none of that name.
    """
    if (match := _EMA.fullmatch(name)) is not None and MIN_EMA_PERCENT <= float(match[1]) <= MAX_EMA_PERCENT:
        # Half of the weight lies beyond the step that is so far behind.
        return ReadOut(name, math.log(0.5) / math.log1p(-float(match[1]) / 100))
    if (match := _FROM_A_STEP.fullmatch(name)) is not None:
        return ReadOut(name, _POWERS[match[1]], int(match[2]))
    raise ConfigError(f"a read-out is {shown(name)}; allowed: {ALLOWED}")


def read_outs_of(names: Sequence[str]) -> tuple[ReadOut, ...]:
    """The read-outs of a run.

    Raises:
        ConfigError: There is none of a name, or one is named twice, or there are more than ``MAX_READ_OUTS``.
    """
    if len(names) > MAX_READ_OUTS:
        raise ConfigError(f"{len(names)} read-outs are named; allowed: {MAX_READ_OUTS}, a vector each")
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(f"the read-out {shown(name)} is named twice; allowed: once")
    return tuple(map(read_out_of, names))


@torch.no_grad()
def fold(before_P: Tensor | None, state_P: Tensor, share: float, out_P: Tensor) -> bool:
    """Averages a state in, piece by piece.

    Args:
        before_P: The average so far; None for the first state.
        state_P: The new state.
        share: Its weight.
        out_P: Where the new average is written; neither of the two.

    Returns:
        Whether it is finite; if not, ``out_P`` means nothing.
    """
    for piece in _pieces(state_P):
        if before_P is None:
            out_P[piece] = state_P[piece]
        else:
            torch.lerp(before_P[piece], state_P[piece], share, out=out_P[piece])
        if not bool(torch.isfinite(out_P[piece]).all()):
            return False
    return True


def _pieces(vector_P: Tensor) -> Iterator[slice]:
    return (slice(start, start + _PIECE_ELEMENTS) for start in range(0, len(vector_P), _PIECE_ELEMENTS))
