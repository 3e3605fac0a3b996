"""What a pull reads and writes by the contents: where the old view and the new one differ.

A pull moves what the kept point shows of the layers below its target. So one view of the old
content serves every target of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qchain.chain.layer import Layer
from qchain.chain.resolve import ALIGNMENT
from qchain.plan.cells import Bools
from qchain.plan.pieces import piece_starts, table_span
from qchain.plan.versions import Behaviour
from qchain.plan.walk import Ranges, cover, ranges_of, walk
from qchain.verify.compare import differing
from qchain.verify.pairing import pairs_in, united

__all__ = ["LONG", "REACH", "Pull", "Pulled", "Window", "differences", "looked_at"]

REACH = 64 << 20
"""How far back the beginning of a piece is looked for, in bytes."""
_BACK = 4 << 20
LONG = 1 << 32
"""A longer window is one where little is allocated: its cells must not become small."""


class Window(Protocol):
    """What is needed of a window of a group (`qchain.plan.traffic`)."""

    layers: Sequence[Layer]
    under: Sequence[Layer]
    start: int
    unit: int
    count: int
    behaviour: Behaviour

    def regions(self, targets: Collection[int]) -> dict[int, tuple[Bools, Bools | None]]: ...


def differences(
    group: Sequence[Layer], under: Sequence[Layer], start: int, end: int, wanted: Ranges
) -> Ranges:
    """The 512-byte sectors of `wanted`, within [start, end), in which the two views differ.

    Args:
        group: the kept image first. What it allocates itself is left out: that never moves.
        under: the new backing and what it backs on; nothing: zeroes.
        start: a multiple of 2 MiB.

    Raises: `ImageError` when the contents cannot be read.
    """
    if not len(wanted):
        return wanted
    chain = [*group, *under]
    pairs = pairs_in(chain, under, start, end, united(wanted.start, wanted.end))
    at = np.searchsorted(wanted.start, pairs.a.start, "right") - 1
    inside = (at >= 0) & (wanted.end[at] > pairs.a.start)
    inside &= (pairs.a.depth > 0) & (pairs.a.depth < len(group))
    inside &= ~(pairs.same | pairs.zero)
    found = np.array(list(differing(chain, under, pairs, inside)), np.int64).reshape(-1, 2)
    return Ranges(found[:, 0], found[:, 0] + found[:, 1])


@dataclass(frozen=True, slots=True)
class Pulled:
    """Bytes that a pull reads and writes as data; what it writes, and what of it as zeroes."""

    read: int
    written: int
    data: Ranges
    zeroes: Ranges


@dataclass(frozen=True, slots=True)
class Pull:
    """A pull into one image: what matters of it beside the maps.

    `cluster`: bytes that one write makes allocated, the image's (sub)cluster. `old_size`,
    `new_size`: where its present backing and the new one end; `size`: where it ends itself.
    """

    cluster: int
    size: int
    old_size: int
    new_size: int
    behaviour: Behaviour

    def onto_backing(self, pieces: Ranges, differs: Ranges, start: int, end: int) -> Pulled:
        """The requests within [start, end), onto a new backing of the same chain.

        Args:
            pieces: what moves by the maps, in qemu's pieces (`qchain.plan.pieces`).
            differs: what differs, all within the pieces.
        """
        old, new = self.old_size, self.new_size
        if self.behaviour.rebase_aligns:
            pieces = cover(pieces, self.cluster).clip(start, min(end, self.size))
            written = cover(differs, self.cluster).clip(start, min(end, self.size))
            read = pieces.clip(0, old).total + pieces.clip(0, new).total
        else:
            done = walk(pieces, differs, self.cluster, old, new)
            again = done.read_again if self.behaviour.rebase_reads_again else None
            parts = [done.old_read, done.new_read, *([] if again is None else [again])]
            read = sum(part.clip(start, end).total for part in parts)
            written = done.differs.clip(start, end)
        data = written.clip(0, old)
        return Pulled(read, data.total, data, written.clip(old, end))

    def onto_nothing(self, left: Ranges, differs: Ranges) -> Pulled:
        """The requests where no backing is left: all of `left` is read, what is not zero written.

        `left`: what the image does not allocate; `differs`: what is not zero, within it.
        """
        if self.behaviour.rebase_aligns:
            differs = cover(differs, self.cluster)
        data = differs.clip(0, min(self.old_size, self.size))
        none = Ranges(data.start[:0], data.end[:0])
        return Pulled(left.clip(0, self.old_size).total, data.total, data, none)


def looked_at(
    window_from: Callable[[int], Window], targets: Collection[int], span: tuple[int, int]
) -> dict[int, Pulled]:
    """What the pulls into `targets` do within `span`, by the contents.

    Args:
        window_from: the window from a guest byte to the end of `span`.

    Raises: `ImageError` when the contents cannot be read.
    """
    start, end = span
    # A piece that began before: where, decides at which steps of 2 MiB it is cut.
    for back in (_BACK, REACH):
        low = max(0, start - back) if end - start <= LONG else start
        window = window_from(low)
        regions = window.regions(targets)
        moved = {target: each for target, (_, each) in regions.items() if each is not None}
        pieces = _pieces(window, moved, start)
        first = min((int(each.start[0]) for each in pieces.values() if len(each)), default=start)
        if first > low or low in (0, start):
            break
    wanted = _union(list(pieces.values()))
    layers, under, size = window.layers, window.under, window.layers[0].size
    aligned = first // ALIGNMENT * ALIGNMENT
    differs = differences(layers, under, aligned, min(end, size), wanted)
    out = {}
    for target, each in pieces.items():
        new_size = under[0].size if under else 0
        cluster, old_size = layers[target].granularity, layers[target + 1].size
        pull = Pull(cluster, size, old_size, new_size, window.behaviour)
        if under:
            out[target] = pull.onto_backing(each, differs.both(each), start, end)
        else:
            left = ranges_of(regions[target][0], None, window.unit, low).clip(start, size)
            out[target] = pull.onto_nothing(left, differs.both(each))
    return out


def _pieces(window: Window, moved: Mapping[int, Bools], start: int) -> dict[int, Ranges]:
    """Per target what moves, in pieces, from the first that reaches beyond `start` on.

    With it comes what lies before it in the same cluster of the target.
    """
    layers, low, unit = window.layers, window.start, window.unit
    begins: dict[int, Bools] = {}
    if moved and window.under and not window.behaviour.rebase_aligns:
        unit = min(unit, *(table_span(layer) for layer in layers if layer.size > low))
        begins = piece_starts(layers, moved, unit, low, window.count * (window.unit // unit))
    out = {}
    for target, mask in moved.items():
        fine = np.repeat(mask, window.unit // unit)
        pieces = ranges_of(fine, begins.get(target), unit, low).clip(low, layers[0].size)
        if not window.under:
            out[target] = pieces.clip(start, layers[0].size)
            continue
        at = int(np.searchsorted(pieces.end, start, "right"))
        if at < len(pieces):
            cluster = layers[target].granularity
            first = int(pieces.start[at]) // cluster * cluster
            at = int(np.searchsorted(pieces.end, first, "right"))
        out[target] = Ranges(pieces.start[at:], pieces.end[at:])
    return out


def _union(parts: Sequence[Ranges]) -> Ranges:
    """What any of them covers."""
    if not parts:
        return Ranges(np.zeros(0, np.int64), np.zeros(0, np.int64))
    start = np.concatenate([part.start for part in parts])
    end = np.concatenate([part.end for part in parts])
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order])
    if not len(start):
        return Ranges(start, end)
    apart = start[1:] > end[:-1]
    return Ranges(start[np.concatenate(([True], apart))], end[np.concatenate((apart, [True]))])
