"""What changed between two points: guest ranges, and the layer that owns each side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qchain.chain.layer import Layer
from qchain.chain.resolve import runs
from qchain.verify.compare import compare

__all__ = ["Difference", "differences"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A guest range in which two points differ.

    `a`, `b`: depth of the layer that decides each side's content; None beyond its end.
    """

    start: int
    length: int
    a: int | None
    b: int | None


def _owners(layers: Sequence[Layer], start: int, length: int) -> Iterator[tuple[int, int | None]]:
    """(end, depth) over the range, in order."""
    end = start + length
    size = layers[0].size
    for table in runs(layers, start, min(end, size)) if start < size else ():
        for extent in table.extents():
            yield extent.end, extent.depth
    if end > size:
        yield end, None


def differences(
    a: Sequence[Layer],
    b: Sequence[Layer],
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Difference]:
    """The differing ranges (512-byte sectors, joined) of two points, cut where owners change.

    Args:
        a, b: layers, active first. The shorter one reads as zeroes beyond its end.
    """
    for start, length in compare(a, b, progress=progress).ranges:
        left, right = _owners(a, start, length), _owners(b, start, length)
        position = start
        end_a, owner_a = next(left)
        end_b, owner_b = next(right)
        begun, last = position, (owner_a, owner_b)
        while True:
            if (owner_a, owner_b) != last:
                yield Difference(begun, position - begun, *last)
                begun, last = position, (owner_a, owner_b)
            position = min(end_a, end_b)
            if position >= start + length:
                break
            if end_a <= position:
                end_a, owner_a = next(left)
            if end_b <= position:
                end_b, owner_b = next(right)
        yield Difference(begun, start + length - begun, *last)
