"""New L2 tables, written as the windows come: many at once where a window covers many."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qchain.native.clusters import Clusters
from qchain.qcow2.entries import COPIED

__all__ = ["Tables"]

U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


class Tables:
    """The L2 tables of the result, and the L1 table that leads to them.

    A table in which nothing changes stays where it is.
    """

    def __init__(self, clusters: Clusters, count: int, words: int, old: U64 | None = None) -> None:
        """
        Args:
            count: guest clusters of the disk.
            words: of 8 bytes that an entry has.
            old: offsets of the present L2 tables, 0 where there is none.
        """
        self.clusters, self.words = clusters, words
        self.per_table = clusters.cluster // (8 * words)
        self.size = max(1, -(-count // self.per_table))
        self.l1: U64 = np.zeros(self.size, np.uint64)
        if old is not None:
            shared = min(len(old), self.size)
            self.l1[:shared] = old[:shared]
        self._index = -1
        self._entries: U64 = np.zeros((self.per_table, words), np.uint64)
        self._dirty = False

    def put(self, first: int, entries: U64, changed: Bools) -> None:
        """The entries of guest clusters `first`.., in order from call to call.

        Args:
            entries: shape (n, words), native byte order.
            changed: shape (n,); where none of a table's is set, the table stays as it is. All
                entries of a table of which any changes must be given, zeroes may be left out.
        """
        at, count = 0, len(entries)
        while at < count:
            index, within = divmod(first + at, self.per_table)
            whole = (count - at) // self.per_table
            if within == 0 and whole > 1:
                self._flush()
                self._write(
                    index,
                    entries[at : at + whole * self.per_table].reshape(whole, -1),
                    np.any(changed[at : at + whole * self.per_table].reshape(whole, -1), axis=1),
                )
                at += whole * self.per_table
                continue
            if index != self._index:
                self._flush()
                self._index = index
            step = min(self.per_table - within, count - at)
            self._entries[within : within + step] = entries[at : at + step]
            self._dirty = self._dirty or bool(changed[at : at + step].any())
            at += step

    def _flush(self) -> None:
        if self._dirty:
            self._write(self._index, self._entries.reshape(1, -1), np.ones(1, bool))
        self._entries[:] = 0
        self._dirty = False
        self._index = -1

    def _write(self, index: int, tables: U64, changed: Bools) -> None:
        """Tables `index`.., shape (n, entries * words): those that changed, in one piece."""
        numbers = np.flatnonzero(changed)
        if not len(numbers):
            return
        # A table without an entry need not be.
        used = tables[numbers].any(axis=1)
        self.l1[index + numbers[~used]] = 0
        numbers = numbers[used]
        if not len(numbers):
            return
        start = self.clusters.take(len(numbers))
        places = (start + np.arange(len(numbers), dtype=np.uint64)) << np.uint64(
            self.clusters.cluster_bits
        )
        self.l1[index + numbers] = places
        self.clusters.target.write(int(places[0]), tables[numbers].astype(">u8").tobytes())

    def close(self) -> None:
        """All entries have been given."""
        self._flush()

    def finish(self) -> int:
        """Write the L1 table, after `close`; where it is, in bytes."""
        raw = np.where(self.l1 == 0, self.l1, self.l1 | np.uint64(COPIED)).astype(">u8").tobytes()
        start = self.clusters.take(-(-len(raw) // self.clusters.cluster))
        self.clusters.target.write(start << self.clusters.cluster_bits, raw)
        return start << self.clusters.cluster_bits
