"""Which layer decides what the guest reads: whole windows at once.

active   A A . . 0 . . .
middle   . B B . B B|            shorter: reads zero past its end
base     C . C C C . C .
result   A A B C 0 B z z         A = depth 0, B = 1, C = 2, z = past the end of 1
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qchain.chain.extent import Extent
from qchain.chain.layer import Cells, Layer
from qchain.errors import DataError
from qchain.qcow2.entries import NO_HOST, Kind

__all__ = ["ALIGNMENT", "Runs", "mask_windows", "resolve", "runs", "windows"]

ALIGNMENT = 2 << 20
"""Windows start at multiples of the largest cluster size."""
_CELLS = 1 << 17
_MASK_CELLS = 1 << 21

Windows: TypeAlias = Iterator[tuple[int, int]]


@dataclass(slots=True)
class Runs:
    """Consecutive guest ranges with one state each; columns of one table.

    All arrays have shape (n,). `start` and `length` are guest bytes; `depth` the
    deciding layer (the last one where none allocates); `kind` the `Kind` there;
    `host` the offset in that layer's data file (`NO_HOST`: none; the descriptor
    for compressed clusters, of which each run holds at most one).
    """

    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    depth: npt.NDArray[np.int32]
    kind: npt.NDArray[np.uint8]
    host: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.start)

    def clip(self, start: int, end: int) -> Runs:
        """The part of the runs within [start, end)."""
        if len(self) == 1 and self.kind[0] == Kind.DATA:
            # Most of what is read comes in long runs: not so much ado about each part.
            begin = int(self.start[0])
            first, last = max(begin, start), min(begin + int(self.length[0]), end)
            if first < last:
                at, length = np.array([first], np.int64), np.array([last - first], np.int64)
                return Runs(at, length, self.depth, self.kind, self.host + np.uint64(first - begin))
        low = np.maximum(self.start, start)
        high = np.minimum(self.start + self.length, end)
        keep = low < high
        moves = (self.host != NO_HOST) & (self.kind != Kind.COMPRESSED)
        host = self.host + np.where(moves, low - self.start, 0).astype(np.uint64)
        return Runs(low[keep], (high - low)[keep], self.depth[keep], self.kind[keep], host[keep])

    def extents(self) -> Iterator[Extent]:
        """The runs as `qemu-img map` would describe them."""
        for start, length, depth, kind, host in zip(
            self.start.tolist(),
            self.length.tolist(),
            self.depth.tolist(),
            self.kind.tolist(),
            self.host.tolist(),
            strict=True,
        ):
            data = kind in (Kind.DATA, Kind.COMPRESSED)
            yield Extent(
                start,
                length,
                # qemu names the layer above the end of a short one.
                depth - 1 if kind == Kind.PAST_END else depth,
                kind in (Kind.DATA, Kind.COMPRESSED, Kind.ZERO),
                not data,
                data,
                kind == Kind.COMPRESSED,
                None if host == NO_HOST or kind == Kind.COMPRESSED else host,
            )


def windows(
    layers: Sequence[Layer], start: int = 0, end: int | None = None, cells: int = _CELLS
) -> Windows:
    """Cut [start, end) of the disk of `layers` (active first) into windows.

    About `cells` cells of the finest layer that reaches there each, so that memory stays the same
    whatever the disk's size. An unaligned end of a layer gets a small window of its
    own, so that fine cells are needed only there. Where no layer allocates anything a
    window may be longer, a power of two: the largest disk has a few dozen of those.
    """
    size = layers[0].size
    end = size if end is None else min(end, size)
    by_size = sorted(layers, key=lambda layer: layer.size)
    sizes = [layer.size for layer in by_size]
    units = [layer.granularity for layer in by_size]
    # Of the layers that are longer than position: those from its place in `sizes` on.
    finest = list(itertools.accumulate(reversed(units), min))[::-1]
    cuts = {
        cut
        for layer in layers
        if layer.size % ALIGNMENT
        for cut in (
            layer.size // ALIGNMENT * ALIGNMENT,
            (layer.size // ALIGNMENT + 1) * ALIGNMENT,
        )
    }
    ordered = sorted(cut for cut in cuts if start < cut < end)
    ordered.append(end)
    position = start
    for cut in ordered:
        while position < cut:
            step = max(ALIGNMENT, finest[bisect.bisect_right(sizes, position)] * cells)
            stop = min(cut, (position // step + 1) * step)
            if position % step == 0:
                stop = max(stop, _hole_end(layers, position, cut))
            yield position, stop
            position = stop


def mask_windows(layers: Sequence[Layer], start: int = 0, end: int | None = None) -> Windows:
    """As `windows`, larger: for where a cell costs a few bits of each layer and no more.

    The cells of all layers together are bounded, so that depth costs no memory either.
    """
    share = max(_MASK_CELLS // len(layers), _CELLS // 2)
    cells = min(1 << share.bit_length() - 1, 4 * _CELLS)
    return windows(layers, start, end, cells)


def _hole_end(layers: Sequence[Layer], start: int, end: int) -> int:
    """How far a window that allocates nothing may reach: a power of two that `start` divides."""
    for layer in layers:
        if start < layer.size:
            # In one window with the end of a layer it would need small cells.
            end = min(end, layer.next_used(start), layer.size)
            if end <= start:
                return start
    longest = 1 << (end - start).bit_length() - 1
    return start + (min(longest, start & -start) if start else longest)


def resolve(layers: Sequence[Layer], start: int, end: int) -> tuple[npt.NDArray[np.int32], Cells]:
    """Depth, kind and host of every cell of the window [start, end).

    Args:
        layers: active first.
        start: a multiple of the granularity of every layer (or of `ALIGNMENT`).

    Returns: (depth, cells), arrays of shape (n,), n = ceil((end - start) / unit). The
        unit adapts to the finest layer that allocates anything in the window.
        `Kind.INVALID` where a cluster that decides breaks the specification.
    """
    unit = end - start
    depth = np.full(1, len(layers) - 1, np.int32)
    out = Cells(unit, np.zeros(1, np.uint8), np.full(1, NO_HOST, np.uint64))
    pending = np.ones(1, bool)
    above: Cells | None = None
    for index, layer in enumerate(layers):
        if layer.size < end and index > 0:
            past = max(layer.size, start)
            new = math.gcd(out.unit, past - start) if past > start else out.unit
            if new != out.unit:
                depth, out, pending = _refine_all(depth, out, pending, new)
            hidden = pending.copy()
            hidden[: (past - start) // out.unit] = False
            depth[hidden] = index
            out.kind[hidden] = Kind.PAST_END
            out.host[hidden] = NO_HOST
            if above is not None:
                # qemu says that the layer above decides, with the host offset of its
                # unallocated subclusters.
                host = above.refine(out.unit).host[: len(hidden)]
                np.copyto(out.host[: len(host)], host, where=hidden[: len(host)])
            pending &= ~hidden
        cells = layer.cells(start, min(end, max(layer.size, start)))
        if cells is not None:
            new = math.gcd(out.unit, cells.unit)
            if new != out.unit:
                depth, out, pending = _refine_all(depth, out, pending, new)
            cells = cells.refine(out.unit)
            limit = min(layer.size, end) - start
            count = min(-(-limit // out.unit), len(cells.kind), len(out.kind))
            kind, host = cells.kind[:count], cells.host[:count]
            takes = pending[:count] & (kind != Kind.UNALLOCATED)
            if index == len(layers) - 1:
                # The base also tells the host offsets of unallocated subclusters.
                takes = pending[:count].copy()
            np.copyto(depth[:count], np.int32(index), where=takes)
            np.copyto(out.kind[:count], kind, where=takes)
            np.copyto(out.host[:count], host, where=takes)
            pending[:count] &= ~takes
        above = cells
        if layer.terminal or not pending.any():
            break
    return depth, out


def _refine_all(
    depth: npt.NDArray[np.int32], cells: Cells, pending: npt.NDArray[np.bool_], new: int
) -> tuple[npt.NDArray[np.int32], Cells, npt.NDArray[np.bool_]]:
    factor = cells.unit // new
    return np.repeat(depth, factor), cells.refine(new), np.repeat(pending, factor)


def _window_runs(layers: Sequence[Layer], start: int, end: int) -> Runs:
    depth, cells = resolve(layers, start, end)
    kind, host, unit = cells.kind, cells.host, cells.unit
    count = len(kind)
    compressed = kind == Kind.COMPRESSED
    follows = np.where(
        (host[:-1] == NO_HOST) | compressed[:-1], host[:-1], host[:-1] + np.uint64(unit)
    )
    change = (depth[1:] != depth[:-1]) | (kind[1:] != kind[:-1]) | (host[1:] != follows)
    first = np.concatenate(([0], np.flatnonzero(change) + 1))
    starts = start + first.astype(np.int64) * unit
    lengths = np.diff(np.append(starts, min(end, start + count * unit)))
    return Runs(starts, lengths, depth[first], kind[first], host[first])


def runs(layers: Sequence[Layer], start: int = 0, end: int | None = None) -> Iterator[Runs]:
    """The chain's state over [start, end), window after window, without gaps.

    Runs are joined within a window, not across two. `start` may be any offset.

    Raises: `DataError` when a cluster of [start, end) that decides breaks the
        specification. One outside of it harms nothing, as in qemu.
    """
    size = layers[0].size if end is None else min(end, layers[0].size)
    if start >= size:
        return
    aligned = start // ALIGNMENT * ALIGNMENT
    for low, high in windows(layers, aligned, end):
        found = _window_runs(layers, low, high)
        if low < start:
            found = found.clip(start, high)
        _require_valid(layers, found)
        yield found


def _require_valid(layers: Sequence[Layer], table: Runs) -> None:
    invalid = np.flatnonzero(table.kind == Kind.INVALID)
    if len(invalid):
        first = int(invalid[0])
        raise DataError(
            layers[int(table.depth[first])].path,
            f"the L2 entry of guest offset {int(table.start[first])} breaks the format",
            "see 'qemu-img check'",
        )
