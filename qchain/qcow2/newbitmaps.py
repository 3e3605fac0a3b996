"""A qcow2 file made of bitmaps alone: no guest data, only what some of them mark.

Source: the qcow2 specification, "Bitmaps". Clusters are of 64 KiB, in this order:

    header | L1 (a hole) | for each bitmap its bits, its table | directory | refcounts
"""

from __future__ import annotations

import heapq
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from qchain.qcow2.extensions import BITMAPS

__all__ = ["NewBitmap", "union", "write_bitmaps"]

_CLUSTER = 65536
_BITS = _CLUSTER * 8  # that one cluster of a bitmap holds
_MAPPED = _CLUSTER * (_CLUSTER // 8)  # guest bytes of one L1 entry
_COUNTED = _CLUSTER // 2  # clusters that one refcount block counts
_ALL_ONES = 1


@dataclass(frozen=True, slots=True)
class NewBitmap:
    """`ranges`: (start, length) in guest bytes, in order. `granularity` in bytes."""

    name: str
    granularity: int
    auto: bool
    ranges: Iterable[tuple[int, int]]


def union(
    many: Iterable[Iterable[tuple[int, int]]], granularity: int, size: int
) -> Iterator[tuple[int, int]]:
    """All that any of `many` lists of ranges (each in order) marks, in whole units, in order.

    The last unit ends where the disk of `size` bytes does.
    """
    low = high = 0
    for start, length in heapq.merge(*many):
        begin = start // granularity * granularity
        end = min(-(-(start + length) // granularity) * granularity, size)
        if begin > high:
            if low < high:
                yield low, high - low
            low = begin
        high = max(high, end)
    if low < high:
        yield low, high - low


def write_bitmaps(file: BinaryIO, size: int, bitmaps: Sequence[NewBitmap]) -> None:
    """Write to the empty `file` an image of a disk of `size` bytes that has `bitmaps`."""
    l1_size = max(1, -(-size // _MAPPED))
    free = 1 + -(-l1_size * 8 // _CLUSTER)
    directory = b""
    for bitmap in bitmaps:
        table, free = _write_bits(file, size, bitmap, free)
        directory += _entry(bitmap, free * _CLUSTER, len(table) // 8)
        free = _put(file, free, table)
    place, free = free, _put(file, free, directory)
    counts = free
    blocks = tables = 0
    while True:
        total = free + tables + blocks
        wanted = -(-total // _COUNTED), -(-blocks * 8 // _CLUSTER)
        if wanted == (blocks, tables):
            break
        blocks, tables = wanted
    first = free + tables
    _put(file, counts, b"".join(struct.pack(">Q", (first + n) * _CLUSTER) for n in range(blocks)))
    for number in range(blocks):
        used = min(_COUNTED, total - number * _COUNTED)
        _put(file, first + number, b"\0\1" * used)
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, size, 0, l1_size, _CLUSTER,
        counts * _CLUSTER, tables, 0, 0, 0, 0, 1, 4, 104,
    )  # fmt: skip
    where = struct.pack(">IIQQ", len(bitmaps), 0, len(directory), place * _CLUSTER)
    extension = struct.pack(">II", BITMAPS, len(where)) + where if bitmaps else b""
    _put(file, 0, header + extension + bytes(8))
    file.truncate(total * _CLUSTER)


def _put(file: BinaryIO, cluster: int, data: bytes) -> int:
    """Write `data` from the start of `cluster` on; the next free one."""
    file.seek(cluster * _CLUSTER)
    file.write(data)
    return cluster + -(-len(data) // _CLUSTER)


def _entry(bitmap: NewBitmap, table: int, length: int) -> bytes:
    name = os.fsencode(bitmap.name)
    bits = bitmap.granularity.bit_length() - 1
    flags = 2 if bitmap.auto else 0
    raw = struct.pack(">QIIBBHI", table, length, flags, 1, bits, len(name), 0) + name
    return raw + bytes(-len(raw) % 8)


def _write_bits(file: BinaryIO, size: int, bitmap: NewBitmap, free: int) -> tuple[bytes, int]:
    """Write the clusters of bits; the table that leads to them, and the next free cluster."""
    covers = _BITS * bitmap.granularity
    table = np.zeros(max(1, -(-size // covers)), ">u8")
    cells = np.zeros(_BITS, np.uint8)
    present = -1
    for start, length in bitmap.ranges:
        low, high = start // bitmap.granularity, -(-(start + length) // bitmap.granularity)
        while low < high:
            index, at = divmod(low, _BITS)
            stop = min(high - low + at, _BITS)
            if index != present:
                free = _flush(file, cells, table, present, free)
                present = index
            cells[at:stop] = 1
            low += stop - at
    free = _flush(file, cells, table, present, free)
    return table.tobytes(), free


def _flush(
    file: BinaryIO,
    cells: npt.NDArray[np.uint8],
    table: npt.NDArray[np.uint64],
    index: int,
    free: int,
) -> int:
    """Write the bits of one table entry, which begin anew after that."""
    if index < 0:
        return free
    if cells.all():
        table[index] = _ALL_ONES
    else:
        table[index] = free * _CLUSTER
        free = _put(file, free, np.packbits(cells, bitorder="little").tobytes())
    cells[:] = 0
    return free
