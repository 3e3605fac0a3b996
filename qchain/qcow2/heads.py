"""The heads of snapshot and bitmap entries, which a hostile image may have by the ten thousand.

What `structures` declares of them, read with `struct`: twenty times faster. Property tests prove
both equal.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = ["BITMAP_HEAD", "SNAPSHOT_HEAD", "BitmapHead", "SnapshotHead", "snapshot_extra"]


class SnapshotHead(NamedTuple):
    """`structures.SNAPSHOT_ENTRY_HEAD`."""

    l1_table_offset: int
    l1_size: int
    id_size: int
    name_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    extra_size: int

    @classmethod
    def parse(cls, raw: bytes) -> SnapshotHead:
        """The first 40 bytes of an entry; `raw` holds exactly these."""
        return cls._make(_SNAPSHOT.unpack(raw))


class BitmapHead(NamedTuple):
    """`structures.BITMAP_ENTRY_HEAD`, its flags as one number."""

    table_offset: int
    table_size: int
    flags: int
    type: int
    granularity_bits: int
    name_size: int
    extra_size: int

    @classmethod
    def parse(cls, raw: bytes) -> BitmapHead:
        """The first 24 bytes of an entry; `raw` holds exactly these."""
        return cls._make(_BITMAP.unpack(raw))

    @property
    def in_use(self) -> bool:
        return bool(self.flags & 1)

    @property
    def auto(self) -> bool:
        return bool(self.flags & 2)

    @property
    def extra_data_compatible(self) -> bool:
        return bool(self.flags & 4)

    @property
    def reserved(self) -> int:
        """The reserved flags, where they are."""
        return self.flags & ~7


_SNAPSHOT = struct.Struct(">QIHHIIQII")
_BITMAP = struct.Struct(">QIIBBHI")
_EXTRA = struct.Struct(">QQQ")
SNAPSHOT_HEAD = _SNAPSHOT.size
BITMAP_HEAD = _BITMAP.size


def snapshot_extra(extra: bytes) -> tuple[int, int, int]:
    """`structures.SNAPSHOT_EXTRA`: (vm_state_size, disk_size, icount), 0 where it ends before."""
    found: tuple[int, int, int] = _EXTRA.unpack(extra[: _EXTRA.size].ljust(_EXTRA.size, b"\0"))
    return found
