"""The snapshot table as a check reads it: entry by entry, going on where that is possible.

Source: qemu's `qcow2_do_read_snapshots` and `qcow2_check_read_snapshot_table`; bytes beyond
the end of the file read as zeroes, as they do there.
"""

from __future__ import annotations

from qchain.hostfile import HostFile
from qchain.qcow2.check.findings import Collector
from qchain.qcow2.header import Header
from qchain.qcow2.header_limits import MAX_L1_BYTES, MAX_SNAPSHOTS
from qchain.qcow2.heads import SNAPSHOT_HEAD, SnapshotHead
from qchain.qcow2.windows import Window

__all__ = ["snapshot_l1_tables"]

_HEAD = SNAPSHOT_HEAD
_MAX_TABLE = 64 << 20
_MAX_EXTRA = 1024
_V3_EXTRA = 16


def snapshot_l1_tables(
    file: HostFile, header: Header, found: Collector
) -> tuple[list[tuple[int, int]], int]:
    """The L1 tables of the internal snapshots.

    Returns: (offset, length) of each in bytes, impossible ones left out; the length of
        the snapshot table in bytes.
    """
    tables: list[tuple[int, int]] = []
    if header.nb_snapshots == 0:
        return tables, 0
    start = position = header.snapshots_offset
    if header.nb_snapshots > MAX_SNAPSHOTS:
        found.add("snapshot-table", start, 0, f"{header.nb_snapshots} snapshots")
        return tables, 0
    if header.has_data_file:
        found.add("snapshot-data-file", start, 0)
    window = Window(file, start)
    for index in range(header.nb_snapshots):
        position = -(-position // 8) * 8
        if position >= file.size:
            # Only empty entries from here on.
            left = header.nb_snapshots - index
            if header.version >= 3:
                found.add("snapshot-incomplete", position, left * _HEAD, count=left)
            position += left * _HEAD
            break
        head = SnapshotHead.parse(window.get(position, _HEAD).ljust(_HEAD, b"\0"))
        if head.extra_size > _MAX_EXTRA:
            why = f"entry {index} has {head.extra_size} bytes of extra data"
            found.add("snapshot-table", position, _HEAD, why)
            break
        length = _HEAD + head.extra_size + head.id_size + head.name_size
        if header.version >= 3 and head.extra_size < _V3_EXTRA:
            found.add("snapshot-incomplete", position, length)
        offset, size = head.l1_table_offset, head.l1_size * 8
        if offset % header.cluster_size or offset >> 63:
            found.add("snapshot-l1", position, length, f"at offset {offset}")
        elif size > MAX_L1_BYTES:
            found.add("snapshot-l1", position, length, f"{head.l1_size} entries")
        elif size:
            tables.append((offset, size))
        position += length
        if position - start > _MAX_TABLE:
            found.add("snapshot-table", start, _MAX_TABLE, f"it is larger than {_MAX_TABLE} bytes")
            break
    return tables, position - start
