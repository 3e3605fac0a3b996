"""How qemu finds host clusters, in numbers: what is free inside a file, what goes to its end.

file  |used|free|used|used| end | new ... | refcount block | new ...

A request takes its clusters in one piece, the first that is large enough after the one before
(`alloc_clusters_noref`). A refcount block is made when its first cluster is needed, and follows
the request that needs it; when the refcount table is full, a larger one with its blocks is
written where the next block's range begins (`alloc_refcount_block`, `qcow2_refcount_area`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Qcow2Layer
from qchain.plan.clusters import ClusterCount
from qchain.qcow2.refcounts import read_refcount_table, refcount_blocks

__all__ = ["FileState", "Room", "room_of"]

I64 = npt.NDArray[np.int64]

NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Room:
    """The state of a qcow2 file, in clusters.

    Attributes:
        used: with a refcount above 0.
        end: the first after the last used one.
        largest: the longest run of unused ones before the end.
        fitting: unused ones before the end that are taken whatever the order of the requests.
        blocks: refcount blocks up to the last one.
        missing: of these, how many there are not.
        table: refcount blocks that the refcount table has room for.
        freed: clusters that would lose their last reference.
    """

    used: int
    end: int
    largest: int
    fitting: int
    blocks: int
    missing: int
    table: int
    freed: int = 0


def room_of(layer: Qcow2Layer, request: int, count: ClusterCount, gone: I64 = NONE) -> Room:
    """Read it from the refcounts. Raises `ImageError` when they cannot be read.

    Args:
        request: the most clusters that are asked for at once.
        count: what it drops of compressed clusters is looked up.
        gone: the numbers of clusters that are not used any more when it begins, ascending.
    """
    header = layer.header
    assert header is not None
    hosts, drops = count.packed
    end = used = largest = fitting = freed = 0
    for first, counts in refcount_blocks(layer.file, header):
        low, high = np.searchsorted(gone, (first, first + len(counts))).tolist()
        if low < high:
            counts = counts.copy()
            counts[gone[low:high] - first] = 0
        taken = int(np.count_nonzero(counts))
        if not taken:
            continue
        used += taken
        if taken == len(counts):
            gaps = np.array([first - end])
            end = first + taken
        else:
            places = np.concatenate(([end - 1], np.flatnonzero(counts) + first))
            gaps = np.diff(places) - 1
            end = int(places[-1]) + 1
        largest = max(largest, int(gaps.max()))
        # A request of n passes by a rest of less than n.
        fitting += int(np.maximum(gaps - (request - 1), 0).sum())
        low, high = np.searchsorted(hosts, (first, first + len(counts))).tolist()
        if low < high:
            freed += int(np.count_nonzero(counts[hosts[low:high] - first] <= drops[low:high]))
    table = read_refcount_table(layer.file, header)
    missing = int(np.count_nonzero(table == 0))
    room = header.refcount_table_clusters * header.cluster_size // 8
    return Room(used, end, largest, fitting, len(table), missing, room, freed)


@dataclass(slots=True)
class FileState:
    """A file that grows; `reuse`: every free cluster is taken before the file is extended."""

    cluster: int
    per_block: int
    reuse: bool
    used: int
    end: int
    fitting: int
    blocks: int
    table: int

    def take(self, count: int, request: int) -> None:
        """`count` clusters, asked for `request` at once at most."""
        fill = min(count, self.end - self.used if self.reuse else self.fitting)
        self.fitting -= min(self.fitting, fill)
        self.used += fill
        self.extend(count - fill, request)

    def extend(self, count: int, request: int) -> None:
        """The same, at the end."""
        while count:
            count -= self._append(count, request)

    def _append(self, count: int, request: int) -> int:
        """Up to `count` clusters at the end, or in what a new refcount table leaves free."""
        blocks = self.blocks
        end = self.end + count
        while (need := -(-(end + blocks - self.blocks) // self.per_block)) > blocks:
            blocks = need
        if blocks <= self.table:
            self.used += count + blocks - self.blocks
            self.end = end + blocks - self.blocks
            self.blocks = blocks
            return count
        return self._new_table(count, request)

    def _new_table(self, count: int, request: int) -> int:
        """The refcount table is full: a larger one, with blocks, begins where a block would.

        Source: `alloc_refcount_block`, `qcow2_refcount_area`. Returns how many of `count`
        came before, or in what is left free between.
        """
        limit = self.table * self.per_block
        before = max(0, limit - self.end - (self.table - self.blocks))
        # The block that did not fit follows the request that needs it.
        last = limit + (0 if self.reuse else request)
        first = -(-(last + 1) // self.per_block)
        total = _refcount_blocks(first * self.per_block, self.cluster, self.per_block)
        clusters = -(-(total + -(-total // 2)) * 8 // self.cluster)
        old = self.table * 8 // self.cluster
        # Ranges that the request leaped over get their blocks when they are filled.
        leaped = first - self.table - 1
        self.used += before + (self.table - self.blocks) + 1 + total - first + clusters - old
        self.end = first * self.per_block + total - first + clusters
        self.blocks, self.table = total, clusters * self.cluster // 8
        left = count - before
        if not self.reuse:
            self.used += leaped
            # What is left free behind the request, and is large enough for any.
            left = min(left, max(0, first * self.per_block - last - 1 - (request - 1)))
        return before + self._fill(left)

    def _fill(self, count: int) -> int:
        count = min(count, self.end - self.used)
        self.used += count
        return count


def _refcount_blocks(clusters: int, cluster: int, per_block: int) -> int:
    """Blocks that qemu makes for `clusters` and for what accounts for them, with some to spare.

    Source: `qcow2_refcount_metadata_size`, generous.
    """
    spared = False
    table = blocks = last = 0
    while True:
        blocks = -(-(clusters + table + blocks) // per_block)
        table = -(-blocks * 8 // cluster)
        now = clusters + blocks + table
        if now == last and spared:
            return blocks
        if now == last:
            clusters += -(-table // 2)
            spared, now = True, 0
        last = now
