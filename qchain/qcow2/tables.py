"""L1 and L2 tables of one image, read in bulk and in windows.

Reading is bounded by the file's real size, and memory by the window asked
for: a table that the file does not hold is an error, not an allocation.
"""

from __future__ import annotations

import itertools
import threading

import numpy as np
import numpy.typing as npt

from qchain.errors import ImageError
from qchain.hostfile import HostFile
from qchain.memory import aligned
from qchain.qcow2.entries import OFFSET_MASK
from qchain.qcow2.header import Header

__all__ = ["MapTables"]

U64 = npt.NDArray[np.uint64]

_SCRATCH_WORDS = 1 << 18
"""The largest buffer (in words) that a thread keeps: larger windows get their own."""
_local = threading.local()


def _scratch(words: int) -> U64:
    """The calling thread's buffer, content undefined: fresh memory costs page faults."""
    if words > _SCRATCH_WORDS:
        return aligned(8 * words).view(np.uint64)
    kept: U64 | None = getattr(_local, "words", None)
    if kept is None or len(kept) < words:
        kept = _local.words = aligned(8 * words).view(np.uint64)
    return kept[:words]


class MapTables:
    """The guest-to-host map of an image: its L1, and L2 entries by range of clusters.

    Raises `ImageError` when a table lies outside the file or is not aligned.
    """

    def __init__(
        self,
        file: HostFile,
        header: Header,
        l1_offset: int,
        l1_size: int,
        size: int | None = None,
    ) -> None:
        """`size`: virtual bytes that are mapped, by default the image's."""
        self.file = file
        self.cluster_bits = header.cluster_bits
        self.words = 2 if header.extended_l2 else 1
        self.per_table = header.cluster_size // (8 * self.words)
        size = header.size if size is None else size
        self.clusters = -(-size // header.cluster_size)
        needed = -(-self.clusters // self.per_table)
        if l1_size < needed:
            raise ImageError(file.path, f"L1 table has {l1_size} entries, {needed} are needed")
        raw = file.pread(l1_offset, needed * 8)
        if len(raw) < needed * 8:
            raise ImageError(file.path, f"L1 table at offset {l1_offset} ends beyond the file")
        self.l1: U64 = np.frombuffer(raw, ">u8").astype(np.uint64) & np.uint64(OFFSET_MASK)
        self._check_offsets()
        self._used = np.flatnonzero(self.l1)
        room = -(-file.size // header.cluster_size)
        if len(self._used) > room:
            # Each table takes a cluster. Without this rule a small file could describe a disk
            # of petabytes with one table, over and over.
            raise ImageError(
                file.path,
                f"{len(self._used)} L1 entries point to L2 tables, the file has room for {room}",
            )

    def _check_offsets(self) -> None:
        bad = (self.l1 & np.uint64((1 << self.cluster_bits) - 1)) != 0
        bad |= self.l1 >= np.uint64(max(self.file.size, 1))
        if bad.any():
            index = int(np.flatnonzero(bad)[0])
            raise ImageError(
                self.file.path,
                f"L1 entry {index} points to {int(self.l1[index])}, where no L2 table can be",
            )

    def next_table(self, first: int) -> int:
        """The first cluster, from `first` on, that an L2 table covers; past the end if none."""
        at = int(np.searchsorted(self._used, first // self.per_table))
        if at == len(self._used):
            return self.clusters
        return max(first, int(self._used[at]) * self.per_table)

    def raw_entries(self, first: int, last: int, *, scratch: bool = False) -> U64 | None:
        """Entries of guest clusters first..last-1 as read: big-endian words.

        Args:
            scratch: the answer may lie in a buffer of the calling thread, which its next
                call with `scratch` overwrites. The caller may overwrite it too.

        Returns: shape ((last - first) * words,) viewed as native uint64, words = 2 for
            extended L2; None when no L2 table covers the range.
        """
        start_table, end_table = first // self.per_table, -(-last // self.per_table)
        tables = self.l1[start_table:end_table]
        if not tables.any():
            return None
        size = 8 * self.words
        count = (last - first) * self.words
        out = _scratch(count) if scratch else aligned(8 * count).view(np.uint64)
        view = memoryview(out.view(np.uint8).data)
        if len(tables) == 1:
            self._read(view, int(tables[0]) + (first - start_table * self.per_table) * size)
            return out
        table_bytes = self.per_table * size
        # Tables that follow each other in the file are read in one call.
        # A hole is no neighbour, even of a table that lies in the file's second cluster.
        hole = tables == 0
        follows = np.where(hole[:-1], hole[1:], np.diff(tables) == table_bytes)
        breaks = np.flatnonzero(~follows) + 1
        edges = [0, *breaks.tolist(), len(tables)]
        for low, high in itertools.pairwise(edges):
            begin = max((start_table + low) * self.per_table, first)
            end = min((start_table + high) * self.per_table, last)
            if tables[low] == 0:
                out[(begin - first) * self.words : (end - first) * self.words] = 0
                continue
            skip = begin - (start_table + low) * self.per_table
            self._read(
                view[(begin - first) * size : (end - first) * size],
                int(tables[low]) + skip * size,
            )
        return out

    def entries(self, first: int, last: int) -> U64 | None:
        """As `raw_entries`, in native byte order."""
        raw = self.raw_entries(first, last)
        return None if raw is None else raw.byteswap(inplace=True)

    def _read(self, view: memoryview, offset: int) -> None:
        if self.file.pread_into(view, offset) < len(view):
            raise ImageError(self.file.path, f"L2 table at offset {offset} ends beyond the file")
