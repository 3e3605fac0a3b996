"""The refcounts that an image holds, by window of host clusters.

Read as qemu's `qcow2_get_refcount` does: what the table does not reach, and what lies
beyond the file, is 0; blocks at impossible offsets leave their clusters unknown.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qchain.hostfile import HostFile
from qchain.qcow2.header import Header
from qchain.qcow2.header_limits import MAX_REFCOUNT_TABLE_BYTES
from qchain.qcow2.refcounts import decode_refcounts

__all__ = ["BLOCK_MASK", "StoredRefcounts"]

BLOCK_MASK = 0xFFFFFFFFFFFFFE00
_HIGHEST = (1 << 32) - 1


class StoredRefcounts:
    """The refcount table of an image, and what its blocks hold.

    Attributes:
        table: its entries as they stand, reserved bits included, shape (n,); ends with
            the last one that is not 0, or at the end of the file.
        maximum: the highest refcount that an image like this can hold.
    """

    def __init__(self, file: HostFile, header: Header) -> None:
        self.file = file
        self.cluster_size = header.cluster_size
        self.order = header.refcount_order
        self.maximum = (1 << (1 << self.order)) - 1
        self.per_block = header.cluster_size * 8 >> self.order
        length = min(header.refcount_table_clusters * header.cluster_size, MAX_REFCOUNT_TABLE_BYTES)
        raw = file.pread(header.refcount_table_offset, length)
        table = np.frombuffer(raw[: len(raw) // 8 * 8], ">u8").astype(np.uint64)
        used = np.flatnonzero(table)
        self.table = table[: int(used[-1]) + 1 if used.size else 0]

    def window(
        self, low: int, high: int
    ) -> tuple[npt.NDArray[np.uint32], list[tuple[int, int]], bool]:
        """Refcounts of host clusters low..high-1.

        Returns: shape (high - low,), values of 2^32 - 1 may stand for higher ones; the
            ranges (begin, end), from `low` on, that are unknown; whether any is not 0.
        """
        values = np.zeros(high - low, np.uint32)
        unknown: list[tuple[int, int]] = []
        stored = False
        blocks = self.table[low // self.per_block : -(-high // self.per_block)]
        for index in np.flatnonzero(blocks).tolist():
            offset = int(blocks[index]) & BLOCK_MASK
            if offset == 0:
                continue
            start = (low // self.per_block + index) * self.per_block
            begin, end = max(start, low), min(start + self.per_block, high)
            if offset % self.cluster_size or offset >> 63:
                unknown.append((begin - low, end - low))
                continue
            raw = self.file.pread(offset, self.cluster_size)
            decoded = decode_refcounts(raw.ljust(-(-len(raw) // 8) * 8, b"\0"), self.order)
            if self.order == 6:
                decoded = np.minimum(decoded, np.uint64(_HIGHEST))
            part = decoded[begin - start : end - start]
            values[begin - low : begin - low + len(part)] = part
            stored = True
        return values, unknown, stored
