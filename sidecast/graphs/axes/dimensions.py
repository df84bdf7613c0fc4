"""What the places along an axis stand for, learned bit by bit while a network runs.

Whatever two axes share is one `Dimension`: operations unite dimensions, split them into factors (a view of heads x
places) or segments (a fused projection's thirds), and hold them where their order means something. What cannot be
followed is held, which takes symmetries away and never adds one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod


class Dimension:
    """The places along an axis: undivided, a product of other dimensions, or several of them one after another.

    Attributes:
        size: How many places there are.
        is_held: Undivided ones only: whether the order of the places means something.
        is_joined: Undivided ones only: whether an operation has related it to another axis.
        factors: Row-major, the last one fastest; empty if it is no product.
        segments: In order; empty if it is not made of several.
    """

    __slots__ = ("_same", "factors", "is_held", "is_joined", "segments", "size")

    def __init__(
        self,
        size: int,
        *,
        is_held: bool = False,
        factors: Sequence[Dimension] = (),
        segments: Sequence[Dimension] = (),
    ) -> None:
        self.size = size
        self.is_held = is_held
        self.is_joined = False
        self.factors = list(factors)
        self.segments = list(segments)
        self._same: Dimension | None = None

    @property
    def found(self) -> Dimension:
        """The dimension that this one was united with, itself if with none."""
        dimension = self
        while dimension._same is not None:
            if dimension._same._same is not None:
                dimension._same = dimension._same._same
            dimension = dimension._same
        return dimension

    def become(self, other: Dimension) -> None:
        """Makes this one another name of ``other``."""
        self._same = other

    @property
    def parts(self) -> list[Dimension]:
        """What it is made of; empty if it is undivided."""
        return self.factors or self.segments


@dataclass(frozen=True)
class Strided:
    """An undivided dimension along an axis: one step in it is ``stride`` places of the axis."""

    dimension: Dimension
    stride: int


@dataclass(frozen=True)
class Run:
    """Places of an axis that are a product of undivided dimensions, from ``offset`` on."""

    offset: int
    factors: tuple[Strided, ...]


def held(size: int) -> Dimension:
    """Places whose order means something: positions, tokens, classes."""
    return Dimension(size, is_held=True)


def hold(dimension: Dimension) -> None:
    """Marks that the order of the places means something."""
    dimension = dimension.found
    for part in dimension.parts:
        hold(part)
    if not dimension.parts:
        dimension.is_held = True


def product_of(dimensions: Iterable[Dimension]) -> Dimension:
    """The dimension whose places are those of several, the last one fastest."""
    factors = [dimension for dimension in dimensions if dimension.size != 1]
    if len(factors) == 1:
        return factors[0]
    return Dimension(prod(factor.size for factor in factors), factors=factors)


def sequence_of(dimensions: Iterable[Dimension]) -> Dimension:
    """The dimension whose places are those of several, one after another."""
    segments = [dimension for dimension in dimensions if dimension.size]
    if len(segments) == 1:
        return segments[0]
    return Dimension(sum(segment.size for segment in segments), segments=segments)


def factorised(dimension: Dimension, sizes: Sequence[int]) -> list[Dimension]:
    """Divides a dimension into factors of these sizes, whose product is its own; held ones if it cannot be."""
    wanted = [size for size in sizes if size != 1]
    found = _factors(dimension.found, wanted)
    if found is None:
        hold(dimension)
        found = [held(size) for size in wanted]
    left = iter(found)
    return [Dimension(1) if size == 1 else next(left) for size in sizes]


def _factors(dimension: Dimension, sizes: list[int]) -> list[Dimension] | None:
    if len(sizes) <= 1:
        return [dimension] if sizes else []
    if dimension.segments:
        return _factors_of_segments(dimension, sizes)
    if not dimension.factors:
        dimension.factors = [_like(dimension, size) for size in sizes]
        return list(dimension.factors)
    left = flat_factors(dimension)[::-1]
    found = []
    for size in sizes:
        group: list[Dimension] = []
        missing = size
        while missing > 1:
            factor = left.pop()
            if missing % factor.size == 0:
                group.append(factor)
                missing //= factor.size
                continue
            if factor.size % missing:
                return None
            pair = _factors(factor, [missing, factor.size // missing])
            if pair is None:
                return None
            left.append(pair[1].found)
            group.append(pair[0])
            missing = 1
        found.append(product_of(group))
    return found


def _factors_of_segments(dimension: Dimension, sizes: list[int]) -> list[Dimension] | None:
    """Segments that are wholes of the last factors differ in the first factor alone."""
    step = prod(sizes[1:])
    segments = [segment.found for segment in dimension.segments]
    if any(segment.size % step for segment in segments):
        return None
    firsts, others = [], [Dimension(size) for size in sizes[1:]]
    for segment in segments:
        first, *rest = factorised(segment, [segment.size // step, *sizes[1:]])
        firsts.append(held(1) if first.size == 1 else first)
        for one, other in zip(rest, others, strict=True):
            unite(one, other)
    dimension.segments = []
    dimension.factors = [sequence_of(firsts), *others]
    return list(dimension.factors)


def flat_factors(dimension: Dimension) -> list[Dimension]:
    """The factors of a dimension, and theirs; itself if it is no product."""
    dimension = dimension.found
    if not dimension.factors:
        return [dimension]
    return [inner for factor in dimension.factors for inner in flat_factors(factor)]


def cut(dimension: Dimension, sizes: Sequence[int]) -> list[Dimension]:
    """Divides a dimension into segments of these sizes, whose sum is its own; held ones if it cannot be."""
    wanted = [size for size in sizes if size]
    found = _segments(dimension.found, wanted)
    if found is None:
        hold(dimension)
        found = [held(size) for size in wanted]
    left = iter(found)
    return [next(left) if size else Dimension(0) for size in sizes]


def _segments(dimension: Dimension, sizes: list[int]) -> list[Dimension] | None:
    if len(sizes) <= 1:
        return [dimension] if sizes else []
    if dimension.factors:
        first, *others = flat_factors(dimension)
        step = dimension.size // first.size
        if any(size % step for size in sizes):
            return None
        firsts = cut(first, [size // step for size in sizes])
        return [product_of((segment, *others)) for segment in firsts]
    if dimension.is_held and not dimension.segments:
        # Loops over positions would cut it into ever smaller pieces, all of them held.
        return [held(size) for size in sizes]
    if not dimension.segments:
        dimension.segments = [_like(dimension, size) for size in sizes]
        return list(dimension.segments)
    left = [segment.found for segment in dimension.segments][::-1]
    found = []
    for size in sizes:
        group: list[Dimension] = []
        missing = size
        while missing:
            segment = left.pop()
            if segment.size > missing:
                segment, rest = cut(segment, [missing, segment.size - missing])
                left.append(rest)
            group.append(segment)
            missing -= segment.size
        found.append(sequence_of(group))
    return found


def _like(dimension: Dimension, size: int) -> Dimension:
    part = Dimension(size, is_held=dimension.is_held)
    part.is_joined = dimension.is_joined
    return part


def unite(one: Dimension, other: Dimension) -> None:
    """Says that two dimensions of one size are the same places in the same order."""
    one, other = one.found, other.found
    if one is other or one.size == 1 == other.size:
        return
    if one.size != other.size:
        hold(one)
        hold(other)
        return
    if one.parts and not other.parts:
        one, other = other, one
    if not one.parts:
        if one.is_held:
            hold(other)
        one.become(other)
        _mark_joined(other)
    elif _agree(one, other):
        one.become(other)
    else:
        hold(one)
        hold(other)


def _mark_joined(dimension: Dimension) -> None:
    dimension = dimension.found
    for part in dimension.parts:
        _mark_joined(part)
    dimension.is_joined = True


def _agree(one: Dimension, other: Dimension) -> bool:
    """Unites the parts of two divided dimensions, dividing them further where the other one is."""
    if one.segments or other.segments:
        divided, by = (other, one) if one.segments else (one, other)
        sizes = [segment.found.size for segment in by.segments]
        pieces = _segments(divided, sizes)
        if pieces is None:
            return False
        for piece, segment in zip(pieces, list(by.segments), strict=True):
            unite(piece, segment)
        return True
    left, right = flat_factors(one)[::-1], flat_factors(other)[::-1]
    while left and right:
        here, there = left.pop().found, right.pop().found
        if here.size < there.size:
            here, there, left, right = there, here, right, left
        if here.size != there.size:
            pair = None if here.size % there.size else _factors(here, [there.size, here.size // there.size])
            if pair is None:
                return False
            here, rest = pair
            left.append(rest)
        unite(here, there)
    return True


def runs_of(dimension: Dimension) -> list[Run]:
    """Takes a dimension apart into products of undivided ones."""
    dimension = dimension.found
    if dimension.segments:
        runs, start = [], 0
        for segment in dimension.segments:
            runs += [Run(start + run.offset, run.factors) for run in runs_of(segment)]
            start += segment.found.size
        return runs
    if dimension.factors:
        runs = [Run(0, ())]
        for factor in dimension.factors:
            size = factor.found.size
            runs = [
                Run(
                    before.offset * size + after.offset,
                    (*(Strided(each.dimension, each.stride * size) for each in before.factors), *after.factors),
                )
                for before in runs
                for after in runs_of(factor)
            ]
        return runs
    return [Run(0, (Strided(dimension, 1),) if dimension.size != 1 else ())]
