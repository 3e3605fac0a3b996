"""What a commit writes as zeroes, and what as data although it is zero.

qemu's mirror asks the block status at the start of each dirty piece. It writes zeroes only
where one extent without data covers whole pieces and whole clusters of the target
(`mirror_iteration`, `bdrv_round_to_clusters`); else it copies. An extent ends with the L2 table
of any layer that is asked for it (`qchain.plan.pieces`), and 16 MiB after the dirty run began.

piece    |---0---|---1---|---2---|-3-|
status   z z z z z z|d d|z z|y y  z z      z, y: zero, but in two layers; d: data
written  zeroes  copied  copied  copied    (3: the disk ends within it)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Cells, Layer, Qcow2Layer
from qchain.chain.resolve import resolve
from qchain.plan.pieces import table_span
from qchain.qcow2.entries import NO_HOST, Kind

__all__ = ["BATCH", "View", "view_of"]

Bools = npt.NDArray[np.bool_]

BATCH = 16 << 20
"""Bytes that mirror takes on in one go: 16 requests of 1 MiB."""


@dataclass(frozen=True, slots=True)
class View:
    """The block status of a window of the disk, in cells of `unit` bytes from guest byte `start`.

    `zero`, shape (n,): no data; `extent`, shape (n,): the number of the extent that a cell is in.
    """

    start: int
    size: int
    unit: int
    zero: Bools
    extent: npt.NDArray[np.int64]

    def copied(
        self, dirty: Bools, unit: int, piece: int, cluster: int, origin: int, span: tuple[int, int]
    ) -> tuple[Bools, int]:
        """What of the dirty pieces is copied as data.

        Args:
            dirty: shape (m,), cells of `unit` bytes, whole pieces.
            piece: bytes of a piece, the commit's granularity.
            cluster: cluster size of the target (of a raw one: `piece`).
            origin: guest byte where the run of dirty pieces began that reaches into the window.
            span: the guest bytes that are counted, whole cells.

        Returns: the cells in which anything is copied, shape (m,); how many bytes of `span` are.
        """
        # Many pieces at once where neither the group nor the view has smaller cells.
        step = max(piece, min(unit, self.unit & -self.unit))
        each = max(1, unit // step)
        # Whole pieces are dirty: their first cells tell.
        wanted: Bools = dirty[:: step // unit] if unit < step else np.repeat(dirty, each)
        zeroed = self._zeroed(wanted, step, cluster, origin)
        left = wanted & ~zeroed
        first, last = (span[0] - self.start) // step, -((self.start - span[1]) // step)
        amount = int(np.count_nonzero(left[first:last])) * step
        beyond = self.start + len(wanted) * step - self.size
        if beyond > 0 and last >= len(left) > first and left[-1]:
            amount -= beyond
        if unit < step:
            return np.repeat(left, step // unit)[: len(dirty)], amount
        out: Bools = np.any(left.reshape(-1, each), axis=1)
        return out, amount

    def _zeroed(self, wanted: Bools, step: int, cluster: int, origin: int) -> Bools:
        """Which of `wanted`, steps of `step` bytes, are written as zeroes."""
        offsets = np.arange(len(wanted), dtype=np.int64) * step
        # The cells in which a step begins and ends; one that the disk cuts has no end.
        whole = offsets <= self.size - self.start - step
        first = np.minimum(offsets // self.unit, len(self.extent) - 1)
        last = np.minimum((offsets + (step - 1)) // self.unit, len(self.extent) - 1)
        zeroed: Bools = (
            wanted & whole & self.zero[first] & (self.extent[first] == self.extent[last])
        )
        if cluster > step and zeroed.any():
            # One request per extent: as a whole it covers whole clusters, or it is copied.
            joins = zeroed[1:] & zeroed[:-1] & (self.extent[first[1:]] == self.extent[last[:-1]])
            # Of each run of dirty pieces so much at once.
            begins = wanted & ~np.concatenate(([False], wanted[:-1]))
            began = np.where(begins, offsets, origin - self.start)
            began[0] = origin - self.start
            began = np.maximum.accumulate(began)
            joins &= (offsets[1:] - began[1:]) % BATCH != 0
            starts = np.flatnonzero(zeroed & ~np.concatenate(([False], joins)))
            ends = np.flatnonzero(zeroed & ~np.concatenate((joins, [False]))) + 1
            # A window starts at a multiple of every cluster size.
            aligned = (starts * step % cluster == 0) & (ends * step % cluster == 0)
            steps = np.zeros(len(wanted) + 1, np.int64)
            np.add.at(steps, starts[aligned], 1)
            np.add.at(steps, ends[aligned], -1)
            zeroed = np.asarray(np.cumsum(steps[:-1]) > 0)
        return zeroed


def view_of(chain: Sequence[Layer], start: int, end: int) -> View:
    """The view of [start, end) of `chain`, the committed point (active first, down to the base).

    `start`: aligned as a window of all layers of `chain` is.
    """
    size = chain[0].size
    end = min(end, size)
    depth, cells = resolve(chain, start, end)
    # Windows are cut at ends of layers, so those that are shorter are not asked in this one.
    asked = [(index, layer) for index, layer in enumerate(chain) if layer.size > start]
    cut = [
        (index, layer, table_span(layer))
        for index, layer in asked
        if start + table_span(layer) - start % table_span(layer) < min(end, layer.size)
    ]
    unit = math.gcd(cells.unit, *(span for _, _, span in cut))
    depth, cells = np.repeat(depth, cells.unit // unit), cells.refine(unit)
    zero = (cells.kind != Kind.DATA) & (cells.kind != Kind.COMPRESSED)
    zero &= cells.kind != Kind.INVALID
    breaks = (depth[1:] != depth[:-1]) | (cells.kind[1:] != cells.kind[:-1])
    breaks |= _jumps(cells)
    # One answer reaches no further than those of the layers above the one that decides.
    for index, layer, span in cut:
        at = np.arange(-start % span, min(end, layer.size) - start, span) // unit
        at = at[at > 0]
        breaks[at - 1] |= depth[at] >= index
    for index, layer in asked:
        if isinstance(layer, Qcow2Layer) and layer.extended:
            breaks |= (depth[1:] > index) & _gaps(layer, start, end, unit, len(breaks))
    extent = np.concatenate((np.zeros(1, np.int64), np.cumsum(breaks, dtype=np.int64)))
    return View(start, size, unit, zero, extent)


def _jumps(cells: Cells) -> Bools:
    """Which cells, from the second on, do not follow the one before in the file."""
    last = cells.host[:-1]
    follows = np.where(last == NO_HOST, last, last + np.uint64(cells.unit))
    return np.asarray(cells.host[1:] != follows)


def _gaps(layer: Layer, start: int, end: int, unit: int, count: int) -> Bools:
    """Where unallocated subclusters of clusters with data end: `_jumps` of `layer`."""
    out = np.zeros(count, bool)
    cells = layer.cells(start, min(end, layer.size))
    if cells is not None and cells.unit >= unit:
        jumps = _jumps(cells.refine(unit))[:count]
        out[: len(jumps)] = jumps
    return out
