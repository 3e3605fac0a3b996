"""Is this header sound? The limits that qemu enforces when it opens an image.

Source: qemu's `qcow2_do_open` and `qcow2_validate_table`; specification,
"Header". Nothing is read here: only numbers are compared, with each other and
with the file's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qchain.qcow2.findings import Finding, Level

if TYPE_CHECKING:
    from qchain.qcow2.header import Header

__all__ = [
    "MAX_BACKING_NAME",
    "MAX_CLUSTER_BITS",
    "MAX_L1_BYTES",
    "MAX_REFCOUNT_TABLE_BYTES",
    "MAX_SNAPSHOTS",
    "MIN_CLUSTER_BITS",
    "judge",
]

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MAX_BACKING_NAME = 1023
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
_SNAPSHOT_HEAD = 40
_MAX_OFFSET = (1 << 63) - 1
_KNOWN_INCOMPATIBLE = 0b11111


def judge(header: Header, file_size: int) -> Iterator[Finding]:
    """All that is wrong with the numbers of `header`; `file_size` in bytes."""
    yield from _features(header)
    yield from _fields(header)
    if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        # Every limit below is counted in clusters.
        yield _invalid(
            f"cluster_bits is {header.cluster_bits}, not {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}"
        )
        return
    if header.header_length > header.cluster_size:
        yield _invalid(f"header of {header.header_length} bytes is longer than a cluster")
    if header.extended_l2 and header.cluster_bits < 14:
        yield _invalid(f"extended L2 entries with clusters of {header.cluster_size}, below 16384")
    yield from _tables(header, file_size)


def _features(header: Header) -> Iterator[Finding]:
    unknown = header.incompatible & ~_KNOWN_INCOMPATIBLE
    if unknown:
        names = ", ".join(header.names_of(0, unknown))
        yield Finding(f"unknown incompatible feature: {names}", Level.UNSUPPORTED)
    if header.corrupt:
        yield Finding("marked corrupt: qemu found broken metadata in it", Level.DAMAGE)
    if header.dirty:
        yield Finding("marked dirty: it was not closed, refcounts may be wrong", Level.WARNING)
    if header.crypt_method > 2:
        yield Finding(f"unknown encryption method {header.crypt_method}", Level.UNSUPPORTED)
    if header.crypt_method == 2 and header.luks_header is None:
        yield _invalid("LUKS encryption without a pointer to the LUKS header")
    if header.compression_type > 1:
        yield Finding(f"unknown compression type {header.compression_type}", Level.UNSUPPORTED)
    if bool(header.incompatible & 8) != bool(header.compression_type):
        yield _invalid(
            f"compression type {header.compression_type} contradicts the feature bit for it"
        )
    if header.has_data_file and header.data_file_name is None:
        yield _invalid("external data file without a name")
    if header.data_file_raw and header.backing_file_offset:
        yield Finding("raw external data file together with a backing file", Level.DAMAGE)
    if header.has_data_file and header.nb_snapshots:
        yield Finding("internal snapshots together with an external data file", Level.DAMAGE)


def _fields(header: Header) -> Iterator[Finding]:
    if header.version == 3 and header.header_length < 104:
        yield _invalid(f"header_length is {header.header_length}, below 104")
    elif header.header_length % 8:
        yield Finding(
            f"header_length is {header.header_length}, not a multiple of 8", Level.WARNING
        )
    if header.refcount_order > 6:
        yield _invalid(f"refcount_order is {header.refcount_order}, above 6")
    if header.stored_size != header.size:
        yield Finding(
            f"virtual size {header.stored_size} is not a multiple of 512: rounded down",
            Level.WARNING,
        )


def _tables(header: Header, file_size: int) -> Iterator[Finding]:
    cluster = header.cluster_size
    needed = -(-header.stored_size // (cluster * header.l2_entries)) if header.l2_entries else 0
    l1_end = header.l1_table_offset + header.l1_size * 8
    if header.stored_size > _MAX_OFFSET // 2:
        yield _invalid(f"virtual size {header.stored_size} is too large")
    if header.l1_size * 8 > MAX_L1_BYTES:
        yield _invalid(f"L1 table of {header.l1_size} entries is larger than {MAX_L1_BYTES} bytes")
    elif header.l1_size < needed:
        yield _invalid(
            f"L1 table is too small: {header.l1_size} entries, {needed} are needed "
            f"for a virtual size of {header.stored_size}"
        )
    yield from _offset("L1 table", header.l1_table_offset, cluster)
    if header.l1_size and l1_end > file_size:
        # qemu reads zeroes there: an image cut short would pass for an empty one.
        yield _invalid(f"L1 table ends at {l1_end}, beyond the file of {file_size} bytes")

    table_bytes = header.refcount_table_clusters * cluster
    table_end = header.refcount_table_offset + table_bytes
    if header.refcount_table_clusters == 0:
        yield _invalid("no refcount table")
    elif table_bytes > MAX_REFCOUNT_TABLE_BYTES:
        yield _invalid(
            f"refcount table of {header.refcount_table_clusters} clusters is larger than "
            f"{MAX_REFCOUNT_TABLE_BYTES} bytes"
        )
    elif table_end - cluster >= file_size:
        yield Finding(
            f"refcount table ends at {table_end}, beyond the file of {file_size} bytes",
            Level.DAMAGE,
        )
    yield from _offset("refcount table", header.refcount_table_offset, cluster)

    if header.nb_snapshots:
        if header.nb_snapshots > MAX_SNAPSHOTS:
            yield _invalid(f"{header.nb_snapshots} internal snapshots, more than {MAX_SNAPSHOTS}")
        elif header.snapshots_offset + header.nb_snapshots * _SNAPSHOT_HEAD > file_size:
            yield Finding("snapshot table lies beyond the file", Level.DAMAGE)
    yield from _offset("snapshot table", header.snapshots_offset, cluster)


def _offset(what: str, offset: int, cluster: int) -> Iterator[Finding]:
    if offset % cluster:
        yield _invalid(f"{what} offset {offset} is not cluster-aligned")
    elif offset >= 1 << 56:
        yield _invalid(f"{what} offset {offset} is impossible, not below 2^56")


def _invalid(text: str) -> Finding:
    return Finding(text, Level.INVALID)
