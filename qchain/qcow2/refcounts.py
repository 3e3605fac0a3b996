"""Refcounts of host clusters: one, or all of them in bulk.

Source: the qcow2 specification, "Host cluster management". Property tests
prove `decode_refcounts` equal to `structures.refcount_block`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qchain.errors import ImageError
from qchain.hostfile import HostFile
from qchain.qcow2.header import Header
from qchain.qcow2.header_limits import MAX_REFCOUNT_TABLE_BYTES

__all__ = [
    "BadBlock",
    "decode_refcounts",
    "read_refcount",
    "read_refcount_table",
    "refcount_blocks",
]

Refcounts = npt.NDArray[np.unsignedinteger]
U64 = npt.NDArray[np.uint64]

_OFFSET_MASK = np.uint64(0xFFFFFFFFFFFFFE00)
_MOST_BAD = 1000


class BadBlock(NamedTuple):
    """A refcount block that cannot be read."""

    table_index: int
    offset: int
    why: str


def decode_refcounts(raw: bytes, order: int) -> Refcounts:
    """The refcounts in the bytes of a block.

    Args:
        raw: any number of whole bytes, a multiple of the width.
        order: refcounts are 1 << order bits wide (0 to 6).

    Returns: shape (len(raw) * 8 >> order,), the smallest unsigned type that holds them.
    """
    if order >= 3:
        width = 1 << (order - 3)
        return np.frombuffer(raw, f">u{width}").astype(f"=u{width}")
    octets = np.frombuffer(raw, np.uint8)
    if order == 0:
        return np.unpackbits(octets, bitorder="little")
    shifts = np.arange(0, 8, 1 << order, dtype=np.uint8)
    mask = np.uint8((1 << (1 << order)) - 1)
    return ((octets[:, None] >> shifts) & mask).reshape(-1)


def read_refcount(file: HostFile, header: Header, host_cluster: int) -> int:
    """Refcount of one host cluster (its index: host offset / cluster size).

    Clusters that the refcount table does not reach, or without a block, have 0.

    Raises:
        ImageError: the header's table, or the block, is not where one can be.
    """
    # Imported late: construct takes its time, and few commands look at one refcount.
    from qchain.qcow2.structures import REFCOUNT_TABLE_ENTRY, refcount_block

    per_block = _per_block(file, header)
    index = host_cluster // per_block
    if host_cluster < 0 or index * 8 >= header.refcount_table_clusters * header.cluster_size:
        return 0
    raw = file.pread(header.refcount_table_offset + index * 8, 8)
    if len(raw) < 8:
        raise ImageError(file.path, f"refcount table entry {index} lies beyond the file")
    offset = REFCOUNT_TABLE_ENTRY.parse(raw).offset
    if offset == 0:
        return 0
    why = _why_bad(offset, header.cluster_size, file.size)
    if why:
        raise ImageError(file.path, f"refcount block {index} at offset {offset} {why}")
    within = host_cluster % per_block
    first_bit = within << header.refcount_order
    count = max(1, 8 >> header.refcount_order)
    length = count << header.refcount_order >> 3
    data = file.pread(offset + (first_bit >> 3), length).ljust(length, b"\0")
    return int(refcount_block(header.refcount_order, count).parse(data)[within % count])


def read_refcount_table(file: HostFile, header: Header) -> U64:
    """Offsets of the refcount blocks, 0 where there is none: shape (n,), native uint64.

    Reserved bits are masked out; trailing entries without a block are left off.
    What the file does not hold counts as no block.

    Raises:
        ImageError: the table is above 8 MiB, not aligned, or starts beyond the file.
    """
    _per_block(file, header)
    length = header.refcount_table_clusters * header.cluster_size
    if length > MAX_REFCOUNT_TABLE_BYTES:
        raise ImageError(file.path, f"refcount table of {length} bytes is too large")
    start = header.refcount_table_offset
    if start % header.cluster_size:
        raise ImageError(file.path, f"refcount table offset {start} is not cluster-aligned")
    raw = file.pread(start, length)
    if length and not raw:
        raise ImageError(file.path, f"refcount table at offset {start} lies beyond the file")
    table = np.frombuffer(raw[: len(raw) // 8 * 8], ">u8").astype(np.uint64) & _OFFSET_MASK
    used = np.flatnonzero(table)
    return table[: int(used[-1]) + 1 if used.size else 0]


def refcount_blocks(
    file: HostFile, header: Header, bad: list[BadBlock] | None = None
) -> Iterator[tuple[int, Refcounts]]:
    """All refcounts, block by block: (index of the block's first host cluster, refcounts).

    Absent blocks (all refcounts 0) are skipped. Memory: the table and one block.
    Two table entries for one block: the second is bad.
    A block cut off by the end of the file reads as zeroes there.

    Args:
        bad: collects the blocks that cannot be read (the first 1000 of a table of a million),
            and the walk goes on.

    Raises:
        ImageError: as `read_refcount_table`; for the first bad block if `bad` is None.
    """
    table = read_refcount_table(file, header)
    per_block = _per_block(file, header)
    fit = (table != 0) & (table % np.uint64(header.cluster_size) == 0)
    fit &= table < np.uint64(file.size)
    # Of equal ones the first, else a small file could have one block read a million times.
    where = np.flatnonzero(fit)
    where = where[np.sort(np.unique(table[where], return_index=True)[1])]
    fit[:] = False
    fit[where] = True
    wrong = np.flatnonzero((table != 0) & ~fit)
    first_bad = int(wrong[0]) if len(wrong) and bad is None else len(table)
    if bad is not None:
        bad += [_bad_block(file, header, table, index) for index in wrong[:_MOST_BAD].tolist()]
    for index in where[where < first_bad].tolist():
        raw = file.pread(int(table[index]), header.cluster_size)
        raw = raw.ljust(header.cluster_size, b"\0")
        yield index * per_block, decode_refcounts(raw, header.refcount_order)
    if first_bad < len(table):
        found = _bad_block(file, header, table, first_bad)
        raise ImageError(
            file.path, f"refcount block {found.table_index} at offset {found.offset} {found.why}"
        )


def _bad_block(file: HostFile, header: Header, table: U64, index: int) -> BadBlock:
    offset = int(table[index])
    why = _why_bad(offset, header.cluster_size, file.size)
    return BadBlock(index, offset, why or "is that of an earlier block")


def _per_block(file: HostFile, header: Header) -> int:
    """Refcounts in one block, which fills one cluster."""
    if header.refcount_order > 6 or not 9 <= header.cluster_bits <= 21:
        raise ImageError(file.path, "refcounts cannot be read: invalid refcount_order or cluster")
    return header.cluster_size * 8 >> header.refcount_order


def _why_bad(offset: int, cluster_size: int, file_size: int) -> str | None:
    if offset % cluster_size:
        return "is not cluster-aligned"
    return "lies beyond the file" if offset >= file_size else None
