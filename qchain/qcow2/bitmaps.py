"""The persistent dirty bitmaps of one image.

Source: the qcow2 specification, "Bitmaps"; limits of qemu's
`bitmap_list_load`, `check_dir_entry` and `bitmap_table_load`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.errors import ImageError, Unsupported
from qchain.hostfile import HostFile
from qchain.qcow2.entries import OFFSET_MASK
from qchain.qcow2.extensions import MAX_BITMAP_DIRECTORY, MAX_BITMAPS, text_of
from qchain.qcow2.header import Header
from qchain.qcow2.heads import BITMAP_HEAD, BitmapHead
from qchain.qcow2.windows import Window

__all__ = [
    "Bitmap",
    "bitmap_clusters",
    "bitmap_table",
    "dirty_ranges",
    "find_bitmap",
    "marked_spans",
    "read_bitmaps",
]

_MAX_NAME = 1023
_MAX_TABLE_ENTRIES = 0x8000000
_MAX_BYTES = 512 << 20
_DIRTY_TRACKING = 1
_ALL_ONES = 1
_TABLE_WINDOW = 1 << 16  # table entries read at once
_BITS_WINDOW = 1 << 17  # bytes of bits unpacked at once: a MiB of cells


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One entry of the bitmap directory."""

    name: str
    granularity: int
    """Guest bytes that one bit stands for."""
    flags: tuple[str, ...]
    """As qemu-img info has them: 'in-use', 'auto'."""
    table_offset: int
    table_size: int
    """Entries of the bitmap table; each stands for one cluster of bits."""
    extra: bytes
    """Extra data, meaning unknown; only present if it may be ignored."""

    @property
    def in_use(self) -> bool:
        """Not stored properly: what it holds is stale."""
        return "in-use" in self.flags


def read_bitmaps(file: HostFile, header: Header) -> list[Bitmap]:
    """All bitmaps of an image, in the order of the directory.

    None when the image's bitmaps are stale as a whole (autoclear bit not set).

    Raises:
        ImageError: a directory that does not hold what the header says, an entry
            beyond qemu's limits.
        Unsupported: unknown bitmap type, or extra data that must not be ignored.
    """
    where = header.bitmaps_extension
    if where is None:
        return []
    if not 1 <= where.nb_bitmaps <= MAX_BITMAPS:
        raise ImageError(file.path, f"{where.nb_bitmaps} bitmaps, not 1 to {MAX_BITMAPS}")
    if where.directory_size > MAX_BITMAP_DIRECTORY:
        raise ImageError(
            file.path, f"bitmap directory of {where.directory_size} bytes is too large"
        )
    if not header.cluster_size or where.directory_offset % header.cluster_size:
        raise ImageError(
            file.path,
            f"bitmap directory offset {where.directory_offset} is not cluster-aligned",
        )
    window = Window(file, where.directory_offset)
    position = where.directory_offset
    end = position + where.directory_size
    result = []
    for index in range(where.nb_bitmaps):
        head_bytes = window.get(position, BITMAP_HEAD)
        # What the file does not hold reads as zeroes, until it is missed below.
        head = BitmapHead.parse(head_bytes.ljust(BITMAP_HEAD, b"\0"))
        length = BITMAP_HEAD + head.extra_size + head.name_size
        padded = -(-length // 8) * 8
        if position + padded > end:
            raise ImageError(file.path, f"bitmap {index} ends beyond the bitmap directory")
        raw = window.get(position, length)
        if len(raw) < length:
            raise ImageError(file.path, f"bitmap {index} ends beyond the file")
        _check(file, header, head, index)
        result.append(_bitmap(head, raw[BITMAP_HEAD:]))
        position += padded
    if position != end:
        raise ImageError(
            file.path, f"bitmap directory has {end - position} bytes more than its bitmaps"
        )
    return result


def _check(file: HostFile, header: Header, entry: BitmapHead, index: int) -> None:
    cluster = header.cluster_size
    if not 1 <= entry.name_size <= _MAX_NAME:
        why = f"a name of {entry.name_size} bytes, not 1 to {_MAX_NAME}"
    elif not 9 <= entry.granularity_bits <= 31:
        why = f"granularity_bits {entry.granularity_bits}, not 9 to 31"
    elif not 1 <= entry.table_size <= _MAX_TABLE_ENTRIES:
        why = f"a table of {entry.table_size} entries"
    elif entry.table_size * cluster > _MAX_BYTES:
        why = f"{entry.table_size * cluster} bytes of bits, more than {_MAX_BYTES}"
    elif entry.table_offset == 0 or entry.table_offset % cluster:
        why = f"a table at offset {entry.table_offset}, which is not cluster-aligned"
    elif entry.reserved:
        why = f"reserved flags {entry.reserved:#x}"
    elif not entry.in_use and _covers(entry, cluster) < header.size:
        why = f"bits for {_covers(entry, cluster)} bytes only, the disk has {header.size}"
    elif entry.type != _DIRTY_TRACKING:
        raise Unsupported(file.path, f"bitmap {index} has unknown type {entry.type}")
    elif entry.extra_size and not entry.extra_data_compatible:
        raise Unsupported(file.path, f"bitmap {index} has extra data that must not be ignored")
    else:
        return
    raise ImageError(file.path, f"bitmap {index} has {why}")


def _covers(entry: BitmapHead, cluster: int) -> int:
    """Guest bytes that the bits in the table's clusters stand for."""
    return int(entry.table_size * cluster * 8) << int(entry.granularity_bits)


def _bitmap(head: BitmapHead, rest: bytes) -> Bitmap:
    flags = (("in-use", head.in_use), ("auto", head.auto))
    return Bitmap(
        name=text_of(rest[head.extra_size : head.extra_size + head.name_size]),
        granularity=1 << head.granularity_bits,
        flags=tuple(name for name, is_set in flags if is_set),
        table_offset=head.table_offset,
        table_size=head.table_size,
        extra=rest[: head.extra_size],
    )


def find_bitmap(file: HostFile, header: Header, name: str) -> Bitmap:
    """The bitmap of that name.

    Raises: `ImageError` when there is none, or the directory cannot be read.
    """
    every = read_bitmaps(file, header)
    for bitmap in every:
        if bitmap.name == name:
            return bitmap
    known = ", ".join(bitmap.name for bitmap in every[:8]) or "none"
    raise ImageError(file.path, f"has no bitmap {name!r}; it has: {known}", "")


def dirty_ranges(file: HostFile, header: Header, bitmap: Bitmap) -> Iterator[tuple[int, int]]:
    """What `bitmap` marks as written: (start, length) in guest bytes.

    In order, adjacent ones joined, in whole units of `bitmap.granularity` but for the end
    of the disk. Memory is a few MiB, whatever the disk's size. For a bitmap that is
    `in_use` it is what was last stored: stale, and not to be relied upon.

    Raises: `ImageError` when the table, or bits that it points to, lie beyond the file
        or break the format (qemu's `check_table_entry`).
    """
    low = high = 0
    for start, end in _marked(file, header, bitmap):
        if start != high or low == high:
            if low < high:
                yield low, high - low
            low = start
        high = end
    if low < high:
        yield low, high - low


def _marked(file: HostFile, header: Header, bitmap: Bitmap) -> Iterator[tuple[int, int]]:
    """(start, end) of marked guest bytes, in order, cut wherever a window ends."""
    cluster = header.cluster_size
    covers = cluster * 8 * bitmap.granularity  # guest bytes of one table entry
    # Entries for what lies beyond the end of the disk mean nothing.
    count = min(bitmap.table_size, -(-header.size // covers))
    for first in range(0, count, _TABLE_WINDOW):
        entries = _entries(file, bitmap, first, min(first + _TABLE_WINDOW, count), cluster)
        set_ones = entries == _ALL_ONES
        for index in np.flatnonzero(entries).tolist():
            start = (first + index) * covers
            if set_ones[index]:
                yield start, min(start + covers, header.size)
                continue
            offset = int(entries[index])
            for skip in range(0, cluster, _BITS_WINDOW):
                begin = start + skip * 8 * bitmap.granularity
                if begin >= header.size:
                    break
                length = min(cluster - skip, _BITS_WINDOW)
                bits = _bits(file, bitmap, offset + skip, length)
                yield from _runs(bits, begin, bitmap.granularity, header.size)


def bitmap_table(file: HostFile, header: Header, bitmap: Bitmap) -> npt.NDArray[np.uint64]:
    """The bitmap table: for each cluster of bits its offset, 1 for all ones, 0 for none.

    Raises: `ImageError` for a table that ends beyond the file or breaks the format.
    """
    return _entries(file, bitmap, 0, bitmap.table_size, header.cluster_size)


def bitmap_clusters(file: HostFile, header: Header) -> npt.NDArray[np.int64]:
    """The numbers of the host clusters that the bitmaps take: directory, tables, bits.

    Raises: as `read_bitmaps` and `bitmap_table`.
    """
    where = header.bitmaps_extension
    if where is None:
        return np.zeros(0, np.int64)
    cluster = header.cluster_size
    taken = [(where.directory_offset, where.directory_size)]
    every = read_bitmaps(file, header)
    taken += [(each.table_offset, each.table_size * 8) for each in every]
    parts = [np.arange(at // cluster, -(-(at + size) // cluster)) for at, size in taken]
    for each in every:
        table = bitmap_table(file, header, each)
        parts.append((table[table > _ALL_ONES] // np.uint64(cluster)).astype(np.int64))
    return np.unique(np.concatenate(parts))


def marked_spans(
    file: HostFile, header: Header, bitmap: Bitmap, span: int, count: int
) -> npt.NDArray[np.bool_]:
    """In which of `count` spans, each of `span` guest bytes (a power of two), any bit is set.

    Raises: as `dirty_ranges`.
    """
    out = np.zeros(count, bool)
    each = bitmap.granularity
    covers = header.cluster_size * 8 * each
    for index, entry in enumerate(bitmap_table(file, header, bitmap).tolist()):
        start = index * covers
        if start >= header.size or not entry:
            continue
        if entry == _ALL_ONES:
            out[start // span : -(-min(start + covers, header.size) // span)] = True
            continue
        bits = np.frombuffer(_bits(file, bitmap, entry, header.cluster_size), np.uint8)
        unit = 8 * each
        if span < unit:
            bits, unit = np.unpackbits(bits, bitorder="little"), each
        starts = start + np.flatnonzero(bits) * unit
        starts = starts[starts < header.size]
        # Of a unit that is longer than a span the first one, and those that follow.
        for more in range(0, unit, span):
            at = (starts + more) // span
            out[at[at < count]] = True
    return out


def _entries(
    file: HostFile, bitmap: Bitmap, first: int, last: int, cluster: int
) -> npt.NDArray[np.uint64]:
    """The entries [first, last) of the bitmap table, checked."""
    raw = file.pread(bitmap.table_offset + first * 8, (last - first) * 8)
    if len(raw) < (last - first) * 8:
        raise ImageError(file.path, f"the table of bitmap {bitmap.name!r} ends beyond the file")
    entries = np.frombuffer(raw, ">u8").astype(np.uint64)
    _check_entries(file, bitmap, entries, cluster)
    return entries


def _bits(file: HostFile, bitmap: Bitmap, offset: int, length: int) -> bytes:
    bits = file.pread(offset, length)
    if len(bits) < length:
        raise ImageError(file.path, f"the bits of bitmap {bitmap.name!r} end beyond the file")
    return bits


def _check_entries(
    file: HostFile, bitmap: Bitmap, entries: npt.NDArray[np.uint64], cluster: int
) -> None:
    offset = entries & np.uint64(OFFSET_MASK)
    bad = (entries & np.uint64(~(OFFSET_MASK | _ALL_ONES) & (1 << 64) - 1)) != 0
    bad |= (offset != 0) & ((entries & np.uint64(_ALL_ONES)) != 0)
    bad |= offset % np.uint64(cluster) != 0
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        raise ImageError(
            file.path,
            f"an entry of the table of bitmap {bitmap.name!r} is {int(entries[index]):#x}, "
            "which breaks the format",
        )


def _runs(bits: bytes, start: int, granularity: int, size: int) -> Iterator[tuple[int, int]]:
    """Runs of ones in `bits`, the first of which stands for guest offset `start`."""
    cells = np.zeros(len(bits) * 8 + 2, np.int8)
    cells[1:-1] = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
    edges = np.flatnonzero(np.diff(cells))
    for low, high in edges.reshape(-1, 2).tolist():
        begin = start + low * granularity
        if begin >= size:
            return
        yield begin, min(start + high * granularity, size)
