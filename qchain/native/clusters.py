"""Host clusters of the file that is written to: taken one after the other behind its end.

What is taken reads as zeroes until it is written to. Nothing that was in the file before is
written to but refcount blocks, in which free clusters are counted as used: whatever part of
that reaches the disk, it leaks clusters and does no harm. New blocks go to the end as well, and
the refcount table that knows them is a new one, in use from the moment the header names it.

    | as it was ............ | data, L2 tables, L1, refcount blocks | refcount table |
                             ^ start                                                 ^ at
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.errors import ImageError
from qchain.hostfile import HostFile
from qchain.native.counts import encode_refcounts
from qchain.native.mover import Target
from qchain.qcow2.header import Header
from qchain.qcow2.header_limits import MAX_REFCOUNT_TABLE_BYTES
from qchain.qcow2.refcounts import decode_refcounts, read_refcount_table

__all__ = ["Clusters", "Placed", "first_free", "last_counted"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Placed:
    """A table: where it begins (bytes), and its size (entries, or clusters)."""

    offset: int
    size: int


class Clusters:
    """The clusters taken from `start` (an index) on, and what counts them."""

    def __init__(
        self,
        target: Target,
        cluster_bits: int,
        order: int,
        start: int,
        table: npt.NDArray[np.uint64] | None = None,
        room: int = 0,
    ) -> None:
        """
        Args:
            order: refcounts are 1 << order bits wide.
            table: offsets of the refcount blocks that there are; None in a new file.
            room: entries that the present refcount table has.
        """
        self.target, self.cluster_bits, self.order = target, cluster_bits, order
        self.cluster = 1 << cluster_bits
        self.per_block = self.cluster * 8 >> order
        self.start = self.at = start
        self.room = room
        self.blocks = dict(enumerate(table.tolist())) if table is not None else {}
        self.blocks = {index: offset for index, offset in self.blocks.items() if offset}
        self.fresh = False
        """Whether a block is new, so that the refcount table must be."""
        self._more: list[I64] = []
        """Clusters that are referred to once more than once, one entry for each time."""
        self._counted = start

    def take(self, count: int) -> int:
        """The first of `count` clusters in one piece (an index)."""
        first = self.at
        self.at += count
        return first

    def refer(self, clusters: I64) -> None:
        """Count one more reference to each of these, which were taken; repeats count."""
        self._more.append(clusters)

    def count(self) -> None:
        """Write the refcounts of all blocks that no more clusters will be taken of.

        To be called when all references to what was taken are known.
        """
        while self._counted // self.per_block < self.at // self.per_block:
            self._count_block(self._counted // self.per_block)

    def _count_block(self, index: int) -> None:
        low = index * self.per_block
        offset = self.blocks.get(index)
        if offset is None:
            # It may count itself.
            offset = self.blocks[index] = self.take(1) << self.cluster_bits
            self.fresh = True
            values = np.zeros(self.per_block, np.uint64)
        else:
            values = self._read(offset)
        high = min(low + self.per_block, self.at)
        first = self._counted
        values[first - low : high - low] = 1
        for clusters in self._more:
            mine = clusters[(clusters >= first) & (clusters < high)]
            np.add.at(values, mine - low, 1)
        kept = [clusters[clusters >= high] for clusters in self._more]
        self._more = [clusters for clusters in kept if len(clusters)]
        self._counted = high
        self.target.write(offset, encode_refcounts(values, self.order))

    def _read(self, offset: int) -> npt.NDArray[np.uint64]:
        raw = self.target.read(offset, self.cluster).ljust(self.cluster, b"\0")
        return decode_refcounts(raw, self.order).astype(np.uint64)

    def finish(self) -> Placed | None:
        """Write what remains to be counted, and a new refcount table where one is needed.

        Returns: the new table, its size in clusters; None where the present one serves.
        Raises: `ImageError` where it would be larger than qemu opens.
        """
        placed = None
        last = self._last_block()
        ahead = range(self._counted // self.per_block, last + 1)
        if self.fresh or last >= self.room or any(index not in self.blocks for index in ahead):
            placed = self._place_table()
        while self._counted < self.at:
            self._count_block(self._counted // self.per_block)
        if placed is not None:
            table = np.zeros(placed.size * self.cluster // 8, ">u8")
            for index, offset in self.blocks.items():
                table[index] = offset
            self.target.write(placed.offset, table.tobytes())
        self.target.reach(self.at << self.cluster_bits)
        return placed

    def _last_block(self) -> int:
        return (self.at - 1) // self.per_block

    def _place_table(self) -> Placed:
        """Take the clusters of a table that covers itself and all the blocks still to come."""
        size = 1
        while True:
            end = self.at + size
            while True:
                first = self._counted // self.per_block
                missing = [
                    index
                    for index in range(first, (end - 1) // self.per_block + 1)
                    if index not in self.blocks
                ]
                if self.at + size + len(missing) <= end:
                    break
                end = self.at + size + len(missing)
            needed = -(-((end - 1) // self.per_block + 1) * 8 // self.cluster)
            if needed <= size:
                break
            size = needed
        if size * self.cluster > MAX_REFCOUNT_TABLE_BYTES:
            raise ImageError(str(self.target.path), "its refcount table would be too large", "")
        return Placed(self.take(size) << self.cluster_bits, size)


def first_free(file: HostFile, header: Header) -> int:
    """The first cluster behind the end of the file, and behind the last one that is counted.

    Raises: `ImageError` when the refcounts cannot be read.
    """
    return last_counted(file, header, -(-file.size // header.cluster_size))


def last_counted(file: HostFile, header: Header, end: int = 0) -> int:
    """The cluster behind the last one that is counted, at least `end` (an index).

    Raises: `ImageError` when the refcounts cannot be read.
    """
    table = read_refcount_table(file, header)
    per_block = header.cluster_size * 8 >> header.refcount_order
    for index in range(len(table) - 1, -1, -1):
        if (index + 1) * per_block <= end:
            break
        if not table[index]:
            continue
        raw = file.pread(int(table[index]), header.cluster_size)
        used = np.flatnonzero(decode_refcounts(raw, header.refcount_order))
        if len(used):
            return max(end, index * per_block + int(used[-1]) + 1)
    return end
