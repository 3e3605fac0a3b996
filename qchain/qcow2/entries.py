"""L2 entries in bulk: what `structures` says of one entry, for arrays of them.

Sources: the qcow2 specification, "Cluster mapping" and "Extended L2 Entries";
the order of the tests is that of qemu's `qcow2_get_cluster_type`. Property
tests prove these functions equal to the construct declarations.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

__all__ = [
    "COMPRESSED",
    "COPIED",
    "NO_HOST",
    "OFFSET_MASK",
    "SUBCLUSTERS",
    "ZERO",
    "Kind",
    "allocated_extended",
    "allocated_standard",
    "compressed_location",
    "decode_extended",
    "decode_standard",
    "zero_extended",
    "zero_standard",
]

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

OFFSET_MASK = 0x00FFFFFFFFFFFE00
"""Bits 9–55 of an L1 or standard L2 entry: the host offset."""
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
"""Bit 0 of a standard entry, version 3 only: the cluster reads as zeroes."""
NO_HOST = (1 << 64) - 1
"""In a host-offset array: no host cluster. (0 would be a valid offset in a data file.)"""

SUBCLUSTERS = 32
"""Subclusters per cluster with extended L2 entries."""


class Kind(IntEnum):
    """What a (sub)cluster is to its own layer."""

    UNALLOCATED = 0
    DATA = 1
    ZERO = 2
    COMPRESSED = 3
    INVALID = 4
    """Breaks the specification; qemu answers a read with EIO and marks the image corrupt."""
    PAST_END = 5
    """Beyond the end of a layer shorter than the disk: reads as zeroes, hides what is below."""


# The allocation test needs no byte order: the mask is swapped once instead of
# every entry.
_ALLOCATED_BE = np.array([OFFSET_MASK | COMPRESSED | ZERO], ">u8").view(np.uint64)[0]
_ZERO_BE = np.array([ZERO], ">u8").view(np.uint64)[0]
_COMPRESSED_BE = np.array([COMPRESSED], ">u8").view(np.uint64)[0]


def allocated_standard(raw: U64, *, data_file: bool = False, overwrite: bool = False) -> Bools:
    """Which entries are allocated (zero clusters included), from big-endian words as read.

    Args:
        raw: shape (n,), the table's bytes viewed as native uint64.
        data_file: the image has an external data file (offset 0 is valid there).
        overwrite: `raw` may be changed. `zero_standard` of it stays the same.

    Returns: shape (n,).
    """
    mask = _ALLOCATED_BE
    if data_file:
        mask = mask | np.array([COPIED], ">u8").view(np.uint64)[0]
    out: Bools = np.bitwise_and(raw, mask, out=raw if overwrite else None) != 0
    return out


def allocated_extended(raw: U64) -> Bools:
    """As `allocated_standard`, for extended entries: shape (2n,) in, (32n,) subclusters out."""
    pairs = raw.reshape(-1, 2)
    first = pairs[:, 0].byteswap()
    bitmap = pairs[:, 1].byteswap()
    both = ((bitmap | (bitmap >> np.uint64(32))) & np.uint64(0xFFFFFFFF)).astype("<u4")
    both[(first & np.uint64(COMPRESSED)) != 0] = 0xFFFFFFFF
    return np.unpackbits(both.view(np.uint8), bitorder="little").view(np.bool_)


def zero_standard(raw: U64) -> tuple[Bools | None, bool]:
    """Which big-endian entries are zero clusters, shape (n,), None if none is.

    And whether any entry is compressed.
    """
    # Most images have none: one pass without a result array tells.
    bits = np.bitwise_or.reduce(raw) if len(raw) else np.uint64(0)
    packed = bool(bits & _COMPRESSED_BE)
    if not bits & _ZERO_BE:
        return None, packed
    out: Bools = (raw & (_ZERO_BE | _COMPRESSED_BE)) == _ZERO_BE
    return out if out.any() else None, packed


def zero_extended(raw: U64) -> Bools | None:
    """As `zero_standard`, per subcluster: shape (2n,) in, (32n,) out."""
    pairs = raw.reshape(-1, 2)
    high = (pairs[:, 1].byteswap() >> np.uint64(32)).astype("<u4")
    high[(pairs[:, 0] & _COMPRESSED_BE) != 0] = 0
    if not high.any():
        return None
    return np.unpackbits(high.view(np.uint8), bitorder="little").view(np.bool_)


def decode_standard(
    entries: U64, *, cluster_bits: int, version: int = 3, data_file: bool = False
) -> tuple[U8, U64]:
    """Kind and host offset of standard L2 entries.

    Args:
        entries: shape (n,), native byte order.

    Returns: kinds, shape (n,); host offsets, shape (n,), `NO_HOST` where there is
        none. A zero cluster may have a host offset (zero-allocated). For a compressed
        cluster the host "offset" is the whole descriptor, see `compressed_location`.
    """
    offset = entries & np.uint64(OFFSET_MASK)
    compressed = (entries & np.uint64(COMPRESSED)) != 0
    zero = (entries & np.uint64(ZERO)) != 0
    has_offset = offset != 0
    if data_file:
        # Offset 0 with COPIED is a place there; but a zero cluster at offset 0 is plain.
        has_offset |= ((entries & np.uint64(COPIED)) != 0) & ~zero
    kind = has_offset.astype(np.uint8)
    kind[zero] = Kind.ZERO if version >= 3 else Kind.INVALID
    unaligned = (offset & np.uint64((1 << cluster_bits) - 1)) != 0
    kind[unaligned] = Kind.INVALID
    kind[compressed] = Kind.COMPRESSED if not data_file else Kind.INVALID
    host = np.where(has_offset, offset, np.uint64(NO_HOST))
    np.copyto(host, entries & np.uint64(COMPRESSED - 1), where=compressed)
    return kind, host


def decode_extended(entries: U64, *, cluster_bits: int, data_file: bool = False) -> tuple[U8, U64]:
    """Kind and host offset of every subcluster of extended L2 entries.

    Args:
        entries: shape (2n,), native byte order: entry word, bitmap word, alternating.

    Returns: kinds and host offsets, shape (32n,). An unallocated subcluster of an
        allocated cluster is UNALLOCATED with a host offset. All subclusters of a
        compressed cluster carry its descriptor.
    """
    words = entries.reshape(-1, 2)
    first, bitmap = words[:, 0], words[:, 1]
    offset = first & np.uint64(OFFSET_MASK)
    compressed = (first & np.uint64(COMPRESSED)) != 0
    has_offset = offset != 0
    if data_file:
        has_offset |= (first & np.uint64(COPIED)) != 0
    bits = np.unpackbits(
        np.ascontiguousarray(bitmap.astype("<u8")).view(np.uint8), bitorder="little"
    ).reshape(-1, 2, SUBCLUSTERS)
    alloc, zero = bits[:, 0].astype(bool), bits[:, 1].astype(bool)
    kind = alloc.astype(np.uint8)
    kind[zero] = Kind.ZERO
    kind[alloc & zero] = Kind.INVALID
    kind[alloc & ~has_offset[:, None]] = Kind.INVALID
    unaligned = (offset & np.uint64((1 << cluster_bits) - 1)) != 0
    kind[unaligned] = Kind.INVALID
    kind[compressed] = Kind.COMPRESSED if not data_file else Kind.INVALID
    step = np.uint64((1 << cluster_bits) // SUBCLUSTERS)
    within = np.arange(SUBCLUSTERS, dtype=np.uint64) * step
    host = np.where(has_offset[:, None], offset[:, None] + within, np.uint64(NO_HOST))
    np.copyto(host, (first & np.uint64(COMPRESSED - 1))[:, None], where=compressed[:, None])
    return kind.reshape(-1), host.reshape(-1)


def compressed_location(descriptor: int, cluster_bits: int) -> tuple[int, int]:
    """Host offset and size in bytes of a compressed cluster.

    x = 62 − (cluster_bits − 8); bits 0..x−1 are the offset, x..61 the additional
    512-byte sectors (specification, "Compressed Clusters Descriptor").
    """
    x = 62 - (cluster_bits - 8)
    offset = descriptor & ((1 << x) - 1)
    sectors = ((descriptor & (COMPRESSED - 1)) >> x) + 1
    return offset, sectors * 512 - (offset & 511)
