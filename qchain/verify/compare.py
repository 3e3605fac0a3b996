"""Do two points read the same? Only what might differ is read, in parallel.

The comparer never reads a range that both sides resolve to the same device,
inode and offset, unless it is told to (`everything`).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer
from qchain.chain.parallel import ahead, workers
from qchain.chain.reader import fill, require_content
from qchain.chain.resolve import Runs
from qchain.memory import aligned
from qchain.qcow2.entries import Kind
from qchain.verify.pairing import Pairs, pair_up
from qchain.verify.shared import SharedExtents

__all__ = ["Comparison", "compare", "differing"]

BATCH = 4 << 20
"""Guest bytes of short runs that a thread is given at once."""
_LONG = 64 << 20
"""The most of one long run, which is read in steps: threads that are handed little wait for
each other at the interpreter's lock."""
_STEP = 2 << 20
"""Of a long run, bytes read and compared at once: both sides stay in the cache."""
SECTOR = 512
MAX_RANGES = 1 << 20


@dataclass
class Comparison:
    """The outcome of a comparison, in bytes.

    Attributes:
        first_difference: guest offset of the first differing byte, None if identical.
        different_bytes: how many bytes differ.
        compared_bytes: guest bytes whose content was read and compared.
        skipped_bytes: guest bytes that need no reading: the same place in the same
            file on both sides, the same blocks of a filesystem (if asked for), or zero on
            both by the maps.
        ranges: (start, length) of differing 512-byte sectors, joined, in order.
    """

    first_difference: int | None = None
    different_bytes: int = 0
    compared_bytes: int = 0
    skipped_bytes: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        return self.first_difference is None

    def add(self, start: int, length: int, different: int, first: int) -> None:
        """Note a differing range; ranges must come in guest order."""
        self.different_bytes += different
        if self.first_difference is None:
            self.first_difference = first
        if self.ranges and sum(self.ranges[-1]) == start:
            start, length = self.ranges[-1][0], self.ranges.pop()[1] + length
        if len(self.ranges) < MAX_RANGES:
            self.ranges.append((start, length))


# One call, for which ctypes lets go of the interpreter's lock; numpy needs two and a third array.
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

_Found = list[tuple[int, int, int, int]]


def _take(table: Runs, index: npt.NDArray[np.int64]) -> Runs:
    return Runs(*(getattr(table, name)[index] for name in Runs.__slots__))


def _differences(start: int, a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> _Found:
    """(start, length, differing bytes, first differing byte) of differing sectors, joined."""
    unequal = a != b
    sectors = np.add.reduceat(unequal, np.arange(0, len(a), SECTOR), dtype=np.int64)
    bad = np.flatnonzero(sectors)
    groups = np.split(bad, np.flatnonzero(np.diff(bad) != 1) + 1)
    found: _Found = []
    for group in groups:
        low = int(group[0]) * SECTOR
        high = min((int(group[-1]) + 1) * SECTOR, len(a))
        first = low + int(np.argmax(unequal[low:high]))
        found.append((start + low, high - low, int(sectors[group].sum()), start + first))
    return found


class _Buffers(threading.local):
    """A thread's two buffers, used again and again: fresh memory costs page faults."""

    def __init__(self) -> None:
        self.sides = aligned(2 * _STEP).reshape(2, _STEP)

    def get(self, wanted: int) -> npt.NDArray[np.uint8]:
        """Shape (2, wanted), content undefined."""
        if self.sides.shape[1] < wanted:
            length = -(-wanted // SECTOR) * SECTOR
            self.sides = aligned(2 * length).reshape(2, length)
        return self.sides[:, :wanted]


_buffers = _Buffers()


def _compare_batch(
    a_layers: Sequence[Layer], b_layers: Sequence[Layer], a: Runs, b: Runs
) -> _Found:
    if len(a) == 1 and a.kind[0] != Kind.COMPRESSED and b.kind[0] != Kind.COMPRESSED:
        return _compare_long(a_layers, b_layers, a, b)
    at = np.concatenate(([0], np.cumsum(a.length)[:-1]))
    total = int(a.length.sum())
    left, right = _buffers.get(total)
    fill(a_layers, a, memoryview(left.data), at)
    fill(b_layers, b, memoryview(right.data), at)
    if _equal(left, right):
        return []
    found: _Found = []
    for start, length, place in zip(a.start.tolist(), a.length.tolist(), at.tolist(), strict=True):
        x, y = left[place : place + length], right[place : place + length]
        if not np.array_equal(x, y):
            found.extend(_differences(start, x, y))
    return found


def _compare_long(a_layers: Sequence[Layer], b_layers: Sequence[Layer], a: Runs, b: Runs) -> _Found:
    """One run on each side, of data or zeroes, in steps."""
    start, length = int(a.start[0]), int(a.length[0])
    sides = _buffers.get(min(length, _STEP))
    views = [memoryview(side.data) for side in sides]
    reads: list[tuple[Layer, memoryview, int]] = []
    for layers, table, side, view in zip((a_layers, b_layers), (a, b), sides, views, strict=True):
        if table.kind[0] == Kind.DATA:
            reads.append((layers[int(table.depth[0])], view, int(table.host[0])))
        else:
            side.fill(0)
    found: _Found = []
    for low in range(0, length, _STEP):
        count = min(_STEP, length - low)
        for layer, view, host in reads:
            layer.read_data(view[:count], host + low)
        left, right = sides[:, :count]
        if not _equal(left, right):
            found += _differences(start + low, left, right)
    return found


def _equal(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> bool:
    """Of two contiguous arrays of one length."""
    return bool(_memcmp(a.ctypes.data, b.ctypes.data, len(a)) == 0)


def _batches(pairs: Pairs, wanted: npt.NDArray[np.bool_]) -> Iterator[tuple[Runs, Runs]]:
    """Cut what is wanted into batches: long runs alone, short ones many at once."""
    index = np.flatnonzero(wanted)
    if not len(index):
        return
    a, b = _take(pairs.a, index), _take(pairs.b, index)
    # Of little every thread gets a part.
    share = int(a.length.sum()) // (8 * workers()) // _STEP * _STEP
    most = min(max(share, BATCH), _LONG)
    # Compressed clusters are not read in steps.
    stepped = (a.kind != Kind.COMPRESSED) & (b.kind != Kind.COMPRESSED)
    long = stepped & (a.length >= _STEP)
    edges = [0, *(np.flatnonzero(long[1:] | long[:-1]) + 1).tolist(), len(a)]
    for first, last in itertools.pairwise(edges):
        pick = np.arange(first, last)
        left, right = _take(a, pick), _take(b, pick)
        ends = np.cumsum(left.length)
        size = most if long[first] else BATCH
        for position in range(0, int(ends[-1]), size):
            yield _part(left, ends, position, size), _part(right, ends, position, size)


def differing(
    a: Sequence[Layer], b: Sequence[Layer], pairs: Pairs, wanted: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, int]]:
    """(start, length) of the 512-byte sectors that differ in the wanted pairs, in order.

    Reads in the calling thread. Raises: `ImageError` when an image cannot be read.
    """
    for left, right in _batches(pairs, wanted):
        for start, length, _, _ in _compare_batch(a, b, left, right):
            yield start, length


def _part(table: Runs, ends: npt.NDArray[np.int64], position: int, size: int) -> Runs:
    """`size` bytes of the runs put end to end, from `position` on; `ends`: where each ends."""
    stop = min(position + size, int(ends[-1]))
    if len(table) == 1:
        return table.clip(int(table.start[0]) + position, int(table.start[0]) + stop)
    first = int(np.searchsorted(ends, position, "right"))
    last = int(np.searchsorted(ends, stop, "left")) + 1
    low = int(table.start[first] + table.length[first] - ends[first]) + position
    high = int(table.start[last - 1] + table.length[last - 1] - ends[last - 1]) + stop
    return _take(table, np.arange(first, last)).clip(low, high)


def compare(
    a: Sequence[Layer],
    b: Sequence[Layer],
    *,
    everything: bool = False,
    stop_early: bool = False,
    extents: SharedExtents | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare the guest-visible content of two points (layers, active first).

    The shorter one reads as zeroes beyond its end. `everything` also reads what both
    resolve to the same place. `stop_early` ends soon after the first difference, which
    alone is then exact. `extents`: what lies in the same blocks of a filesystem needs no
    reading either. `progress` is called with (guest bytes done, guest bytes in all).

    Raises: `ImageError` when an image cannot be read.
    """
    require_content([*a, *b])
    out = Comparison()
    size = max(a[0].size, b[0].size)

    def batches() -> Iterator[tuple[Runs, Runs]]:
        for pairs in pair_up(a, b):
            skip = pairs.zero if everything else pairs.zero | pairs.same
            if extents is not None and not everything and not skip.all():
                skip |= extents.same(a, b, pairs.a, pairs.b)
            out.skipped_bytes += int(pairs.a.length[skip].sum())
            for left, right in _batches(pairs, ~skip):
                out.compared_bytes += int(left.length.sum())
                yield left, right

    def compare_one(batch: tuple[Runs, Runs]) -> tuple[int, _Found]:
        left, right = batch
        return int(left.start[-1] + left.length[-1]), _compare_batch(a, b, left, right)

    with contextlib.closing(ahead(compare_one, batches(), workers() + 2)) as answers:
        for end, differences in answers:
            for found in differences:
                out.add(*found)
            if progress is not None:
                progress(end, size)
            if stop_early and not out.identical:
                break
    if progress is not None:
        progress(size, size)
    return out
