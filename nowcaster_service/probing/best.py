"""The averages of a run with the lowest losses on the probe, of whatever step, kept although there are newer ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sidecast.nowcaster_service.read_outs.average import Average
from sidecast.nowcaster_service.vector_store import VectorFile

_NAME = re.compile(r"best([1-9])")


@dataclass(frozen=True, kw_only=True)
class Best:
    """One that is kept.

    Attributes:
        name: Of the read-out, or ``raw``.
        average: As it was then.
        loss: On the probe.
    """

    name: str
    average: Average
    loss: float

    @property
    def rank(self) -> tuple[float, int, str]:
        """Lower is better; of equal losses the earlier."""
        return self.loss, self.average.step, self.name


class BestKept:
    """The best of one session. Their files are pinned: whoever owned them gives them back when there are newer ones.

    Args:
        num_kept: How many.

    Attributes:
        items: Best first.
    """

    def __init__(self, num_kept: int) -> None:
        self.items: list[Best] = []
        self._num_kept = num_kept

    @property
    def names(self) -> list[str]:
        """Under which they can be had."""
        return [f"best{number}" for number in range(1, self._num_kept + 1)]

    def find(self, name: str) -> Best | None:
        """The one of a name, such as ``best1``; None if there is none, or none yet."""
        match = _NAME.fullmatch(name)
        return self.items[int(match[1]) - 1] if match is not None and int(match[1]) <= len(self.items) else None

    def offer(self, averages: Mapping[str, Average], losses: Mapping[str, float]) -> list[VectorFile]:
        """Takes what is among the best.

        Args:
            averages: What was evaluated; their files are pinned by somebody else until this returns.
            losses: By name; what has none is not taken.

        Returns:
            Files to be unpinned once no record names them.
        """
        if self._num_kept == 0:
            return []
        new = [Best(name=name, average=averages[name], loss=loss) for name, loss in losses.items()]
        ranked = sorted([*self.items, *new], key=lambda item: item.rank)[: self._num_kept]
        for item in ranked:
            if item in new:
                item.average.vector.pin()
        dropped = [item.average.vector for item in self.items if item not in ranked]
        self.items = ranked
        return dropped

    def restore(self, items: Sequence[Best], step: int | None = None) -> None:
        """Takes over what another session has kept, with its pins, and lets go of what is beyond a step or too much.

        Args:
            items: All that it has.
            step: Of the checkpoint that the run goes on from; None: any.
        """
        ranked = sorted(items, key=lambda item: item.rank)
        kept = [item for item in ranked if step is None or item.average.step <= step][: self._num_kept]
        for item in ranked:
            if item not in kept:
                item.average.vector.unpin()
        self.items = kept

    def release(self) -> list[Best]:
        """Hands all of them over, with their pins."""
        items, self.items = self.items, []
        return items
