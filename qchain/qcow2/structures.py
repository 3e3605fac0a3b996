"""Every structure of the qcow2 format, declared with construct.

These declarations are the specification of qchain: single parses go through
them, and property tests prove what is faster equal to them, `heads` and the
numpy decoders of `entries` and `refcounts`. All integers are big endian. Offsets are bytes into
the image file unless said otherwise. The rule beside each field is that of
the qcow2 specification (docs/interop/qcow2 of QEMU), section named above it.
Reserved bits are declared, not checked: whoever judges them needs their value.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from construct import (
    Aligned,
    Array,
    BitsInteger,
    BitStruct,
    Bitwise,
    Bytes,
    Computed,
    Const,
    ExprAdapter,
    Flag,
    IfThenElse,
    Int8ub,
    Int16ub,
    Int32ub,
    Int64ub,
    Struct,
    this,
)

from qchain.qcow2.heads import MAGIC

__all__ = [
    "BITMAPS_EXTENSION",
    "BITMAP_ENTRY",
    "BITMAP_ENTRY_HEAD",
    "BITMAP_TABLE_ENTRY",
    "EXTENSION",
    "EXTENSION_HEAD",
    "FEATURE_NAME",
    "HEADER_V2",
    "HEADER_V3_TAIL",
    "L1_ENTRY",
    "LUKS_POINTER",
    "MAGIC",
    "REFCOUNT_TABLE_ENTRY",
    "SNAPSHOT_ENTRY",
    "SNAPSHOT_ENTRY_HEAD",
    "SNAPSHOT_EXTRA",
    "SUBCLUSTER_BITMAP",
    "l2_entry",
    "l2_entry_extended",
    "refcount_block",
]

# --- Section "Header" -------------------------------------------------------

HEADER_V2: Any = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ub,  # 2 or 3
    # 0: no backing file. The name is not terminated and lies in the first cluster.
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,  # bytes of the name, at most 1023
    "cluster_bits" / Int32ub,  # cluster size = 1 << cluster_bits; at least 9, qemu: at most 21
    "size" / Int64ub,  # virtual disk size in bytes; qemu rounds it down to 512
    "crypt_method" / Int32ub,  # 0 none, 1 AES-CBC, 2 LUKS
    "l1_size" / Int32ub,  # entries of the active L1 table
    "l1_table_offset" / Int64ub,  # cluster-aligned
    "refcount_table_offset" / Int64ub,  # cluster-aligned
    "refcount_table_clusters" / Int32ub,  # clusters that the refcount table occupies
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,  # cluster-aligned
)
"""The first 72 bytes, common to both versions; all there is in version 2."""

HEADER_V3_TAIL: Any = Struct(
    # Unknown bits: must not be opened. 0 dirty, 1 corrupt, 2 data file, 3 compression
    # type, 4 extended L2.
    "incompatible" / Int64ub,
    "compatible" / Int64ub,  # unknown bits may be ignored. 0 lazy refcounts
    "autoclear" / Int64ub,  # unknown bits: clear on write. 0 bitmaps valid, 1 raw data file
    "refcount_order" / Int32ub,  # refcounts are 1 << order bits wide; at most 6
    "header_length" / Int32ub,  # bytes; at least 104, a multiple of 8
    # From here on a field is absent when header_length ends before it (then 0).
    "compression_type" / Int8ub,  # 0 zlib (raw deflate), 1 zstd
    "padding" / Bytes(7),  # pads to a multiple of 8
)
"""Bytes 72 to 111 of version 3, as if header_length were 112."""

# --- Section "Header extensions" --------------------------------------------

EXTENSION_HEAD: Any = Struct(
    "type" / Int32ub,  # 0 ends the area; unknown ones may be ignored
    "length" / Int32ub,  # of the data, without head and padding
)

EXTENSION: Any = Struct(
    "type" / Int32ub,
    "length" / Int32ub,
    "data" / Aligned(8, Bytes(this.length)),  # padded to 8 bytes
)

FEATURE_NAME: Any = Struct(
    "type" / Int8ub,  # 0 incompatible, 1 compatible, 2 autoclear
    "bit" / Int8ub,  # bit number within that bitmap
    "name" / Bytes(46),  # padded with zeroes, not terminated when it fills the field
)

LUKS_POINTER: Any = Struct(
    "offset" / Int64ub,  # of the LUKS header, cluster-aligned
    "length" / Int64ub,  # bytes, clusters behind it included
)

BITMAPS_EXTENSION: Any = Struct(
    "nb_bitmaps" / Int32ub,  # at least 1 (else there is no extension), at most 65535
    "reserved" / Int32ub,  # zero
    "directory_size" / Int64ub,  # bytes, all entries together
    "directory_offset" / Int64ub,  # cluster-aligned
)

# --- Section "Host cluster management" --------------------------------------


def _shifted(bits: int, shift: int) -> Any:
    """An offset stored without its `shift` lowest bits, as bytes."""
    return ExprAdapter(BitsInteger(bits), lambda obj, _: obj << shift, lambda obj, _: obj >> shift)


REFCOUNT_TABLE_ENTRY: Any = BitStruct(
    # 0: the whole block is absent, all its refcounts are 0. Cluster-aligned.
    "offset" / _shifted(55, 9),  # bits 9-63
    "reserved" / BitsInteger(9),  # bits 0-8
)


@cache
def refcount_block(order: int, count: int) -> Any:
    """`count` refcounts, each 1 << `order` bits wide (order 0 to 6).

    Widths below a byte fill each byte from its least significant bit on;
    `count` must then be whole bytes.
    """
    if order >= 3:
        return Array(count, (Int8ub, Int16ub, Int32ub, Int64ub)[order - 3])
    width = 1 << order
    per_byte = 8 // width
    # construct reads bits from the most significant on: each byte is turned round.
    one_byte = ExprAdapter(
        Bitwise(Array(per_byte, BitsInteger(width))),
        lambda obj, _: list(obj)[::-1],
        lambda obj, _: list(obj)[::-1],
    )
    return ExprAdapter(
        Array(count // per_byte, one_byte),
        lambda obj, _: [value for group in obj for value in group],
        lambda obj, _: [list(obj[i : i + per_byte]) for i in range(0, len(obj), per_byte)],
    )


# --- Section "Cluster mapping" ----------------------------------------------

L1_ENTRY: Any = BitStruct(
    "copied" / Flag,  # bit 63: the L2 table's refcount is exactly one
    "reserved_high" / BitsInteger(7),  # bits 56-62
    "offset" / _shifted(47, 9),  # bits 9-55: the L2 table, cluster-aligned; 0: none
    "reserved_low" / BitsInteger(9),  # bits 0-8
)

_STANDARD = Struct(
    "reserved_high" / BitsInteger(6),  # bits 56-61
    # Bits 9-55: the host cluster, aligned. 0: none, except in a data file with `copied`.
    "offset" / _shifted(47, 9),
    "reserved_low" / BitsInteger(8),  # bits 1-8
    # Bit 0, version 3, not with extended L2: reads as zeroes, whether or not there is an offset.
    "zero" / Flag,
)


def _compressed(cluster_bits: int) -> Any:
    """Section "Compressed Clusters Descriptor": the low 62 bits, x of them the offset."""
    x = 62 - (cluster_bits - 8)
    return Struct(
        # Bits x-61: 512-byte sectors used, besides the one that the offset lies in.
        "additional_sectors" / BitsInteger(62 - x),
        "offset" / BitsInteger(x),  # bits 0-(x-1): any byte, not aligned
        # The data ends with its last sector, so the first one counts from the offset on.
        "size" / Computed((this.additional_sectors + 1) * 512 - this.offset % 512),
    )


@cache
def l2_entry(cluster_bits: int) -> Any:
    """A standard L2 entry: 8 bytes. `body` holds the fields of its kind."""
    return BitStruct(
        "copied" / Flag,  # bit 63: refcount exactly one; never set when compressed
        "compressed" / Flag,  # bit 62
        "body" / IfThenElse(this.compressed, _compressed(cluster_bits), _STANDARD),
    )


SUBCLUSTER_BITMAP: Any = BitStruct(
    # Both bits of a subcluster set is invalid. construct lists the highest first:
    # both lists are turned round, so that index i is subcluster i.
    "zero" / ExprAdapter(Array(32, Flag), lambda obj, _: obj[::-1], lambda obj, _: obj[::-1]),
    "allocated" / ExprAdapter(Array(32, Flag), lambda obj, _: obj[::-1], lambda obj, _: obj[::-1]),
)
"""Section "Extended L2 Entries": high 32 bits reads-as-zero, low 32 bits allocated."""


@cache
def l2_entry_extended(cluster_bits: int) -> Any:
    """An extended L2 entry: 16 bytes. The bitmap of a compressed cluster is ignored."""
    return Struct("entry" / l2_entry(cluster_bits), "subclusters" / SUBCLUSTER_BITMAP)


# --- Section "Snapshots" ----------------------------------------------------

SNAPSHOT_EXTRA: Any = Struct(
    # Each field exists only if the extra data reaches its end.
    "vm_state_size" / Int64ub,  # bytes, replaces the 32-bit field
    "disk_size" / Int64ub,  # virtual size in bytes when the snapshot was taken
    "icount" / Int64ub,  # all ones: none
)

SNAPSHOT_ENTRY_HEAD: Any = Struct(
    "l1_table_offset" / Int64ub,  # cluster-aligned
    "l1_size" / Int32ub,  # entries
    "id_size" / Int16ub,
    "name_size" / Int16ub,
    "date_sec" / Int32ub,  # since the epoch
    "date_nsec" / Int32ub,
    "vm_clock_nsec" / Int64ub,  # guest time since it was started
    "vm_state_size" / Int32ub,  # bytes; 0: none
    "extra_size" / Int32ub,  # at least 16 in version 3; qemu: at most 1024
)

SNAPSHOT_ENTRY: Any = Aligned(
    8,  # every entry starts at a multiple of 8
    Struct(
        *SNAPSHOT_ENTRY_HEAD.subcons,
        "extra" / Bytes(this.extra_size),
        "id" / Bytes(this.id_size),
        "name" / Bytes(this.name_size),
    ),
)

# --- Section "Bitmaps" ------------------------------------------------------

BITMAP_ENTRY_HEAD: Any = Struct(
    "table_offset" / Int64ub,  # of the bitmap table, cluster-aligned
    "table_size" / Int32ub,  # entries of the bitmap table
    "flags"
    / BitStruct(
        "reserved" / BitsInteger(29),  # bits 3-31
        "extra_data_compatible" / Flag,  # bit 2: unknown extra data may be ignored
        "auto" / Flag,  # bit 1: records all writes
        "in_use" / Flag,  # bit 0: was not stored properly, its content is stale
    ),
    "type" / Int8ub,  # 1: dirty tracking bitmap
    "granularity_bits" / Int8ub,  # one bit covers 1 << granularity_bits bytes; 9 to 31
    "name_size" / Int16ub,  # at least 1, at most 1023
    "extra_size" / Int32ub,
)

BITMAP_ENTRY: Any = Aligned(
    8,  # every entry starts at a multiple of 8
    Struct(
        *BITMAP_ENTRY_HEAD.subcons,
        "extra" / Bytes(this.extra_size),
        "name" / Bytes(this.name_size),
    ),
)

BITMAP_TABLE_ENTRY: Any = BitStruct(
    "reserved_high" / BitsInteger(8),  # bits 56-63
    "offset" / _shifted(47, 9),  # bits 9-55: cluster with bitmap data; 0: see all_ones
    "reserved_low" / BitsInteger(8),  # bits 1-8
    "all_ones" / Flag,  # bit 0, only without an offset: that part is all ones, else all zeroes
)
