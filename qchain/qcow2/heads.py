"""Headers, extensions, heads of snapshot and bitmap entries: what every image is read by.

What `structures` declares of them, read with `struct`: twenty times faster, and construct, whose
import takes as long as the rest of a small command, is not loaded. Chains have a thousand headers,
hostile images ten thousands of snapshots. Property tests prove both equal.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = [
    "BITMAPS_EXTENSION",
    "BITMAP_HEAD",
    "EXTENSION_HEAD",
    "FEATURE_NAME",
    "HEADER_V2",
    "HEADER_V3_TAIL",
    "LUKS_POINTER",
    "MAGIC",
    "SNAPSHOT_HEAD",
    "BitmapHead",
    "BitmapsExtension",
    "HeaderTail",
    "HeaderV2",
    "LuksPointer",
    "SnapshotHead",
    "extension_head",
    "feature_name",
    "snapshot_extra",
]

MAGIC = b"QFI\xfb"


class HeaderV2(NamedTuple):
    """`structures.HEADER_V2` behind its magic."""

    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int

    @classmethod
    def parse(cls, raw: bytes) -> HeaderV2:
        """From the first 72 bytes of an image, or more; whoever calls has looked at the magic."""
        return cls._make(_HEADER.unpack_from(raw))


class HeaderTail(NamedTuple):
    """`structures.HEADER_V3_TAIL` without its padding."""

    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    header_length: int
    compression_type: int

    @classmethod
    def parse(cls, raw: bytes) -> HeaderTail:
        """From exactly 40 bytes."""
        return cls._make(_TAIL.unpack(raw))


class LuksPointer(NamedTuple):
    """`structures.LUKS_POINTER`, where the LUKS header is: offset and length in bytes."""

    offset: int
    length: int

    @classmethod
    def parse(cls, raw: bytes) -> LuksPointer:
        """From exactly 16 bytes."""
        return cls._make(_LUKS.unpack(raw))


class BitmapsExtension(NamedTuple):
    """`structures.BITMAPS_EXTENSION`, where the bitmap directory is: sizes, offsets in bytes."""

    nb_bitmaps: int
    reserved: int
    directory_size: int
    directory_offset: int

    @classmethod
    def parse(cls, raw: bytes) -> BitmapsExtension:
        """From exactly 24 bytes."""
        return cls._make(_BITMAPS.unpack(raw))


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


def extension_head(raw: bytes) -> tuple[int, int]:
    """`structures.EXTENSION_HEAD`: (type, length), from exactly 8 bytes."""
    kind, length = _EXTENSION.unpack(raw)
    return kind, length


def feature_name(raw: bytes) -> tuple[int, int, bytes]:
    """`structures.FEATURE_NAME`: (type, bit, name as padded), from exactly 48 bytes."""
    kind, bit, name = _FEATURE.unpack(raw)
    return kind, bit, name


_HEADER = struct.Struct(">4xIQIIQIIQQIIQ")
_TAIL = struct.Struct(">QQQIIB7x")
_EXTENSION = struct.Struct(">II")
_FEATURE = struct.Struct(">BB46s")
_LUKS = struct.Struct(">QQ")
_BITMAPS = struct.Struct(">IIQQ")
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_BITMAP = struct.Struct(">QIIBBHI")
_EXTRA = struct.Struct(">QQQ")
HEADER_V2 = _HEADER.size
HEADER_V3_TAIL = _TAIL.size
EXTENSION_HEAD = _EXTENSION.size
FEATURE_NAME = _FEATURE.size
LUKS_POINTER = _LUKS.size
BITMAPS_EXTENSION = _BITMAPS.size
SNAPSHOT_HEAD = _SNAPSHOT.size
BITMAP_HEAD = _BITMAP.size


def snapshot_extra(extra: bytes) -> tuple[int, int, int]:
    """`structures.SNAPSHOT_EXTRA`: (vm_state_size, disk_size, icount), 0 where it ends before."""
    found: tuple[int, int, int] = _EXTRA.unpack(extra[: _EXTRA.size].ljust(_EXTRA.size, b"\0"))
    return found
