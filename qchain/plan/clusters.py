"""Which host clusters of a target a merge takes and gives back, counted window by window.

What a write means depends on what the target has at that place:

entry         data written                        zeroes written
none, zero    a new cluster                       nothing
host cluster  into that cluster                   the cluster becomes free
compressed    a new cluster, the old bytes free   the old bytes become free

Bytes of compressed clusters share host clusters: one becomes free with its last reference.
Version 2 knows no zero clusters: there zeroes are data, but without a backing file free space
does as well (`qcow2_subcluster_zeroize`). A raw file has blocks instead, whose holes are filled
or come about.
"""

from __future__ import annotations

import math
import threading
from typing import overload

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK

__all__ = ["BLOCK", "ClusterCount", "Entries"]

Bools = npt.NDArray[np.bool_]
I64 = npt.NDArray[np.int64]

_NO_WORDS = np.zeros(0, np.uint64)

BLOCK = 4096
"""Bytes of a filesystem's block, the unit of a raw file's holes."""
_MOST_AT_ONCE = 4 << 20
"""More than any request of qemu-img writes."""


class ClusterCount:
    """What one target gets and loses, in clusters (raw: in blocks of 4096 bytes).

    Attributes:
        committed: new ones that the commit needs for data.
        pulled: further ones that the pull needs.
        written: all that get data, new or not.
        freed: whole ones that zero writes free.
        unpacked: compressed ones that are written over.
        longest: of the longest run of written ones, or up to twice of it: no request needs more
            at once. 1 is exact.
    """

    def __init__(self, layer: Layer, new_size: int, below: int) -> None:
        """`new_size`: virtual size afterwards; `below`: that of the backing file, 0 without."""
        self.layer, self.new_size = layer, new_size
        self.unit = BLOCK if layer.header is None else layer.header.cluster_size
        self.committed = self.pulled = self.written = 0
        self.freed = self.unpacked = self.longest = 0
        self.touched: Bools = np.zeros(0, bool)
        self.there: Bools = np.zeros(0, bool)
        header = layer.header
        self._zeroes_are_data = (
            header is not None and header.version < 3 and layer.backing is not None
        )
        # Growing over a longer backing file, qemu hides it with zeroes (`qcow2_co_truncate`).
        self._hides = new_size > layer.size and below > layer.size
        self._end_written = False
        self._packed: list[I64] = []
        self._hosts: list[I64] = []
        self._lock = threading.Lock()

    def note(
        self,
        start: int,
        cell: int,
        copied: Bools | None,
        dirty: Bools | None,
        moved: Bools | None,
        host: Bools | None = None,
    ) -> None:
        """Count what is written into a window. May be called by several threads.

        Args:
            start: guest offset of the window, a multiple of every cluster size.
            cell: bytes of a cell of the masks, each of shape (n,) or None (nothing).
            copied: what a commit writes as data; the rest of `dirty` it writes as zeroes.
            moved: what a pull writes.
            host: what the target has, if that is all data of its own, uncompressed; None
                where its entries must tell.
        """
        zero = None if dirty is None or copied is None or dirty is copied else dirty > copied
        if zero is not None and self._zeroes_are_data:
            copied, zero = dirty, None
        each = max(1, cell // self.unit)
        step = self.unit * each
        first, rest, gone = (_per(mask, cell, step) for mask in (copied, moved, zero))
        # A pull writes where neither the target nor the commit does: of whole clusters each is
        # counted once. Of parts it may fill up what the commit has begun.
        apart = step == cell and self.unit == self.layer.granularity
        over = first if apart else _or(first, rest)
        own: Entries | None
        if host is None or self.new_size < self.layer.size:
            # Of a target that is cut, the host clusters themselves are asked for.
            length = max((len(mask) for mask in (over, gone) if mask is not None), default=0)
            own = self.own(start, start + step * length, step)
        else:
            own = Entries(_NO_WORDS, 0)
            own.host = _per(host, cell, step)
        written = _count(over)
        committed = written if apart else _count(first)
        new, freed, unpacked = written, 0, 0
        packed: I64 | None = None
        if own is not None:
            both = _count(over, own.host)
            new -= both
            committed -= both if apart else _count(first, own.host)
            freed = _count(gone, own.host)
            if len(own.packed):
                unpacked = _count(_or(over, gone), own.packed)
                packed = own.packed_hosts(_or(over, gone))
        if apart:
            pulled = _count(rest)
            new, written = new + pulled, written + pulled
        at = (self.layer.size - start) // step
        most = -(-_MOST_AT_ONCE // step)
        longest = max(_longest(mask, most) for mask in (over, rest))
        with self._lock:
            self.committed += committed * each
            self.pulled += (new - committed) * each
            self.written += written * each
            self.freed += freed * each
            self.unpacked += unpacked
            self.longest = max(self.longest, longest * each)
            self._end_written |= each == 1 and any(_at(mask, at) for mask in (over, rest, gone))
            if packed is not None:
                self._packed.append(packed)
            if freed and own is not None and gone is not None and self.new_size < self.layer.size:
                self._hosts.append(own.hosts(gone))

    def own(self, start: int, end: int, step: int) -> Entries | None:
        """What the target has in a window, in pieces of `step` bytes; None: nothing."""
        layer = self.layer
        end = min(end, layer.size)
        if start >= end:
            return None
        if isinstance(layer, Qcow2Layer):
            # Where the cells of a window are larger than its clusters it has nothing at all.
            bits = layer.cluster_bits
            words = layer.tables.entries(start >> bits, -(-end >> bits))
            return None if words is None else Entries(words[:: layer.tables.words], bits)
        masks = layer.masks(start, end)
        if masks is None:
            return None
        fine = math.gcd(masks.unit, step)
        blocks = _per(np.repeat(masks.allocated, masks.unit // fine), fine, step)
        out = Entries(_NO_WORDS, 0)
        out.host = blocks
        return out

    @property
    def tables(self) -> int:
        """L2 tables that come into being."""
        return int(np.count_nonzero((self.touched | self._hiding) & ~self.there))

    @property
    def early(self) -> int:
        """How many of `tables` surely come before anything else."""
        hiding = int(np.count_nonzero(self._hiding & ~self.there))
        if hiding or not self.touched.any():
            return hiding
        # Whichever request comes first.
        return int(not np.any(self.touched & self.there))

    @property
    def _hiding(self) -> Bools:
        """The L2 tables that are needed for zeroes behind the old end."""
        layer = self.layer
        out = np.zeros_like(self.touched)
        first = -(-layer.size // layer.granularity) * layer.granularity
        if self._hides and first < self.new_size:
            out[first // self._span :] = True
        return out

    @property
    def cut_tables(self) -> tuple[int, int]:
        """L2 tables that come into being when the target is cut: those that stay, and all.

        qemu discards what is beyond the new end, and needs tables to do so
        (`discard_in_l2_slice`); only the one that reaches over that end is kept.
        """
        layer = self.layer
        first = -(-self.new_size // self.unit) * self.unit
        if not isinstance(layer, Qcow2Layer) or first >= layer.size:
            return 0, 0
        index = first // self._span
        beyond = int(np.count_nonzero(layer.tables.l1[index:] == 0))
        if first % self._span == 0:
            return 0, beyond
        there = self.there[index] or self.touched[index]
        return int(not there), beyond

    @property
    def _span(self) -> int:
        """Guest bytes of one L2 table."""
        layer = self.layer
        assert isinstance(layer, Qcow2Layer)
        return layer.cluster_size * layer.tables.per_table

    def add_end(self) -> None:
        """Count the cluster at the old end, where the target grows over a longer backing file.

        The zeroes behind that end, up to the next (sub)cluster, are written as data.
        """
        layer = self.layer
        if self._end_written or not self._hides or layer.size % layer.granularity == 0:
            return
        start = layer.size // self.unit * self.unit
        own = self.own(start, layer.size, self.unit)
        if own is not None and own.host[0]:
            return
        self.committed += 1
        packed = None if own is None else own.packed_hosts(np.ones(1, bool))
        if packed is not None:
            self._packed.append(packed)

    @property
    def packed(self) -> tuple[I64, I64]:
        """Host clusters that lose references of compressed clusters, and how many each."""
        return count_equal(self._packed)

    @property
    def let_go(self) -> list[I64]:
        """Host clusters that lose references, one item for each; only of a target that shrinks."""
        return [*self._packed, *self._hosts]


class Entries:
    """L2 entries of consecutive clusters (raw: blocks).

    Attributes, each of shape (n,): `host`: has a cluster of its own, alone; `packed`:
    compressed.
    """

    def __init__(self, words: npt.NDArray[np.uint64], bits: int) -> None:
        self.words, self.bits = words, bits
        self.packed: Bools = (words & np.uint64(COMPRESSED)) != 0
        # Without COPIED qemu takes another cluster (`cluster_needs_new_alloc`).
        self.host: Bools = (words & np.uint64(COPIED)) != 0
        self.host &= ((words & np.uint64(OFFSET_MASK)) != 0) & ~self.packed

    def hosts(self, which: Bools) -> I64:
        """The numbers of the host clusters, where they are the only one, of `which`.

        A raw image has none.
        """
        count = min(len(which), len(self.words))
        words = self.words[:count][which[:count] & self.host[:count]]
        return (words & np.uint64(OFFSET_MASK)).astype(np.int64) >> self.bits

    def packed_hosts(self, which: Bools | None) -> I64 | None:
        """Those that the compressed clusters of `which` refer to, one item for each reference."""
        if which is None or not self.packed.any():
            return None
        count = min(len(which), len(self.packed))
        words = self.words[:count][which[:count] & self.packed[:count]]
        if not len(words):
            return None
        shift = 62 - (self.bits - 8)
        offset = (words & np.uint64((1 << shift) - 1)).astype(np.int64)
        sectors = ((words & np.uint64(COMPRESSED - 1)) >> np.uint64(shift)).astype(np.int64) + 1
        low = offset >> self.bits
        high = (offset // 512 + sectors) * 512 - 1 >> self.bits
        steps = range(1, int((high - low).max()) + 1)
        return np.concatenate([low, *((low + step)[low + step <= high] for step in steps)])


def count_equal(parts: list[I64]) -> tuple[I64, I64]:
    """The different numbers in `parts`, ascending, and how often each is there."""
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    numbers, counts = np.unique(np.concatenate(parts), return_counts=True)
    return numbers, counts.astype(np.int64)


def _or(a: Bools | None, b: Bools | None) -> Bools | None:
    if a is None or a is b:
        return b
    return a if b is None else a | b


def _count(mask: Bools | None, other: Bools | None = None) -> int:
    """How many are set (in both)."""
    if mask is None:
        return 0
    if other is None:
        return int(np.count_nonzero(mask))
    count = min(len(mask), len(other))
    return int(np.count_nonzero(mask[:count] & other[:count]))


def _at(mask: Bools | None, at: int) -> bool:
    return mask is not None and 0 <= at < len(mask) and bool(mask[at])


@overload
def _per(mask: Bools, cell: int, unit: int) -> Bools: ...
@overload
def _per(mask: Bools | None, cell: int, unit: int) -> Bools | None: ...
def _per(mask: Bools | None, cell: int, unit: int) -> Bools | None:
    """Per piece of `unit` bytes, whole cells: is any cell set?"""
    if mask is None or unit == cell:
        return mask
    factor = unit // cell
    short = -len(mask) % factor
    if short:
        mask = np.concatenate((mask, np.zeros(short, bool)))
    out: Bools = np.any(mask.reshape(-1, factor), axis=1)
    return out


def _longest(mask: Bools | None, most: int) -> int:
    """Length of the longest run of True: at least that, less than twice of it; 1 exactly.

    `most`: longer ones make no difference.
    """
    if mask is None or not mask.any():
        return 0
    length = 1
    while length < most:
        # True where a run of `length` begins; it goes on for as many where another one does.
        mask = mask[:-length] & mask[length:]
        if not mask.any():
            return 2 * length - 1
        length *= 2
    return most
