"""The persistent dirty bitmaps of one image.

Source: the qcow2 specification, "Bitmaps"; limits of qemu's
`bitmap_list_load` and `check_dir_entry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qchain.errors import ImageError, Unsupported
from qchain.hostfile import HostFile
from qchain.qcow2.extensions import MAX_BITMAP_DIRECTORY, MAX_BITMAPS, text_of
from qchain.qcow2.header import Header
from qchain.qcow2.structures import BITMAP_ENTRY, BITMAP_ENTRY_HEAD
from qchain.qcow2.windows import Window

__all__ = ["Bitmap", "read_bitmaps"]

_HEAD = BITMAP_ENTRY_HEAD.sizeof()
_MAX_NAME = 1023
_MAX_TABLE_ENTRIES = 0x8000000
_MAX_BYTES = 512 << 20
_DIRTY_TRACKING = 1


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
        length = _HEAD
        head_bytes = window.get(position, _HEAD)
        if len(head_bytes) == _HEAD:
            head = BITMAP_ENTRY_HEAD.parse(head_bytes)
            length += head.extra_size + head.name_size
        padded = -(-length // 8) * 8
        if position + padded > end:
            raise ImageError(file.path, f"bitmap {index} ends beyond the bitmap directory")
        raw = window.get(position, length)
        if len(raw) < length:
            raise ImageError(file.path, f"bitmap {index} ends beyond the file")
        entry = BITMAP_ENTRY.parse(raw.ljust(padded, b"\0"))
        _check(file, header, entry, index)
        result.append(_bitmap(entry))
        position += padded
    if position != end:
        raise ImageError(
            file.path, f"bitmap directory has {end - position} bytes more than its bitmaps"
        )
    return result


def _check(file: HostFile, header: Header, entry: Any, index: int) -> None:
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
    elif entry.flags.reserved:
        why = f"reserved flags {entry.flags.reserved << 3:#x}"
    elif not entry.flags.in_use and _covers(entry, cluster) < header.size:
        why = f"bits for {_covers(entry, cluster)} bytes only, the disk has {header.size}"
    elif entry.type != _DIRTY_TRACKING:
        raise Unsupported(file.path, f"bitmap {index} has unknown type {entry.type}")
    elif entry.extra_size and not entry.flags.extra_data_compatible:
        raise Unsupported(file.path, f"bitmap {index} has extra data that must not be ignored")
    else:
        return
    raise ImageError(file.path, f"bitmap {index} has {why}")


def _covers(entry: Any, cluster: int) -> int:
    """Guest bytes that the bits in the table's clusters stand for."""
    return int(entry.table_size * cluster * 8) << int(entry.granularity_bits)


def _bitmap(entry: Any) -> Bitmap:
    flags = (("in-use", entry.flags.in_use), ("auto", entry.flags.auto))
    return Bitmap(
        name=text_of(entry.name),
        granularity=1 << entry.granularity_bits,
        flags=tuple(name for name, is_set in flags if is_set),
        table_offset=entry.table_offset,
        table_size=entry.table_size,
        extra=entry.extra,
    )
