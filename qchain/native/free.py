"""What only the old tables referred to, given free after the switch.

The old map is held against the new one, a few tables at a time: host clusters that only the
old one names, its L2 tables, its L1 table, the old refcount table. Their refcounts go down by
one; where a stop leaves some of that undone, clusters are leaked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qchain.errors import ImageError
from qchain.hostfile import HostFile
from qchain.native.counts import encode_refcounts
from qchain.native.mover import Target
from qchain.qcow2.entries import COMPRESSED, OFFSET_MASK
from qchain.qcow2.header import Header, read_header
from qchain.qcow2.heads import HeaderV2
from qchain.qcow2.refcounts import decode_refcounts, read_refcount_table

__all__ = ["free_old"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

_AT_ONCE = 1 << 19
"""Words of L2 tables that are held against each other at once."""
_SECTOR = np.int64(512)


def free_old(fd: int, path: Path, before: bytes) -> int:
    """Give free what the header `before` (its first bytes) led to, and the present one does not.

    To be done once: what is given free may be taken again by the next writer.

    Returns: how many references were given up.
    Raises: `ImageError` when a table cannot be read, or refcounts are not what they must be;
        `OSError`.
    """
    target = Target(fd, path)
    with HostFile(path) as file:
        header = read_header(file)
        old = HeaderV2.parse(before)
        counts = _Counts(target, file, header)
        total = 0
        for clusters in _released(file, header, old):
            counts.lower(clusters)
            total += len(clusters)
    target.flush()
    return total


@dataclass
class _Counts:
    """Refcounts that are lowered, block by block."""

    target: Target
    file: HostFile
    header: Header

    def __post_init__(self) -> None:
        self.table = read_refcount_table(self.file, self.header)
        self.per_block = self.header.cluster_size * 8 >> self.header.refcount_order

    def lower(self, clusters: I64) -> None:
        """By one for each of these, which may repeat."""
        clusters = np.sort(clusters)
        index = clusters // self.per_block
        breaks = np.flatnonzero(np.diff(index)) + 1
        for part in np.split(clusters, breaks) if len(clusters) else ():
            block = int(part[0]) // self.per_block
            offset = int(self.table[block]) if block < len(self.table) else 0
            if not offset:
                raise ImageError(self.file.path, f"refcount block {block} is missing")
            raw = self.file.pread(offset, self.header.cluster_size)
            values = decode_refcounts(raw, self.header.refcount_order).astype(np.int64)
            np.subtract.at(values, part - block * self.per_block, 1)
            if (values < 0).any():
                raise ImageError(self.file.path, f"refcount block {block} counts too little")
            self.target.write(
                offset, encode_refcounts(values.astype(np.uint64), self.header.refcount_order)
            )


def _released(file: HostFile, header: Header, old: HeaderV2) -> Iterator[I64]:
    """Host clusters that only the old header led to, in batches; repeated per reference."""
    bits = header.cluster_bits
    if old.l1_table_offset != header.l1_table_offset:
        yield _span(old.l1_table_offset, old.l1_size * 8, bits)
        yield from _entries(file, header, old)
    if old.refcount_table_offset != header.refcount_table_offset:
        yield _span(old.refcount_table_offset, old.refcount_table_clusters << bits, bits)


def _span(offset: int, length: int, bits: int) -> I64:
    count = -(-length >> bits)
    return (offset >> bits) + np.arange(count, dtype=np.int64)


def _entries(file: HostFile, header: Header, old: HeaderV2) -> Iterator[I64]:
    """The L2 tables that differ, and what they alone refer to."""
    before = _l1(file, old.l1_table_offset, old.l1_size)
    after = _l1(file, header.l1_table_offset, header.l1_size)
    after = np.pad(after, (0, max(0, len(before) - len(after))))[: len(before)]
    changed = np.flatnonzero((before != after) & (before != 0))
    if not len(changed):
        return
    yield (before[changed] >> np.uint64(header.cluster_bits)).astype(np.int64)
    words = header.cluster_size // 8
    step = max(1, _AT_ONCE // words)
    for low in range(0, len(changed), step):
        part = changed[low : low + step]
        gone = _gone(_tables(file, header, before[part]), _tables(file, header, after[part]),
                     header)  # fmt: skip
        if len(gone):
            yield gone


def _l1(file: HostFile, offset: int, size: int) -> U64:
    raw = file.pread(offset, size * 8)
    if len(raw) < size * 8:
        raise ImageError(file.path, f"L1 table at offset {offset} ends beyond the file")
    return np.frombuffer(raw, ">u8").astype(np.uint64) & np.uint64(OFFSET_MASK)


def _tables(file: HostFile, header: Header, offsets: U64) -> U64:
    """First words of all entries of the tables, zeroes where there is none."""
    size = header.cluster_size
    out = np.zeros((len(offsets), size // 8), np.uint64)
    for index in np.flatnonzero(offsets).tolist():
        raw = file.pread(int(offsets[index]), size)
        if len(raw) < size:
            raise ImageError(file.path, f"L2 table at offset {offsets[index]} ends beyond the file")
        out[index] = np.frombuffer(raw, ">u8")
    words: U64 = out.reshape(-1)[:: header.l2_entry_size // 8]
    return words


def _gone(before: U64, after: U64, header: Header) -> I64:
    """Host clusters, one for each reference, that `before` has and `after` has not."""
    packed = (before & np.uint64(COMPRESSED)) != 0
    kept = (after & np.uint64(COMPRESSED)) != 0
    mask = np.uint64(OFFSET_MASK)
    plain = ~packed & ((before & mask) != 0)
    plain &= kept | ((before & mask) != (after & mask))
    hosts: I64 = ((before[plain] & mask) >> np.uint64(header.cluster_bits)).astype(np.int64)
    entries = before[packed & (before != after)]
    if not len(entries):
        return hosts
    shift = np.uint64(62 - (header.cluster_bits - 8))
    offset = (entries & np.uint64((1 << int(shift)) - 1)).astype(np.int64)
    sectors = ((entries & np.uint64(COMPRESSED - 1)) >> shift).astype(np.int64) + 1
    begin = offset // _SECTOR * _SECTOR
    low = begin >> header.cluster_bits
    counts = ((begin + sectors * _SECTOR - 1) >> header.cluster_bits) - low + 1
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.concatenate((hosts, np.repeat(low, counts) + within))
