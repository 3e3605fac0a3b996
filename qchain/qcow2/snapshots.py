"""The internal snapshots of one image.

Source: the qcow2 specification, "Snapshots"; limits of qemu's
`qcow2_do_read_snapshots`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qchain.errors import ImageError
from qchain.hostfile import HostFile
from qchain.qcow2.extensions import text_of
from qchain.qcow2.header import Header
from qchain.qcow2.header_limits import MAX_SNAPSHOTS
from qchain.qcow2.structures import SNAPSHOT_ENTRY, SNAPSHOT_ENTRY_HEAD, SNAPSHOT_EXTRA
from qchain.qcow2.windows import Window

__all__ = ["Snapshot", "find_snapshot", "read_snapshots"]

_HEAD = SNAPSHOT_ENTRY_HEAD.sizeof()
_MAX_TABLE = 64 << 20
_MAX_EXTRA = 1024
_MAX_L1 = 32 << 20
_NO_ICOUNT = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry of the snapshot table. Sizes and offsets in bytes, `l1_size` in entries."""

    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int
    """Virtual size when it was taken; today's where the entry does not say."""
    icount: int | None
    l1_table_offset: int
    l1_size: int


def read_snapshots(file: HostFile, header: Header) -> list[Snapshot]:
    """All internal snapshots, in the order of the table.

    Whether the L1 tables they name can be read is for whoever reads them.

    Raises:
        ImageError: more than 65536, a table that is not aligned, larger than 64 MiB
            or beyond the file, extra data of more than 1024 bytes.
    """
    if header.nb_snapshots == 0:
        return []
    if header.nb_snapshots > MAX_SNAPSHOTS:
        raise ImageError(
            file.path, f"{header.nb_snapshots} internal snapshots, more than {MAX_SNAPSHOTS}"
        )
    start = position = header.snapshots_offset
    if not header.cluster_size or start % header.cluster_size:
        raise ImageError(file.path, f"snapshot table offset {start} is not cluster-aligned")
    window = Window(file, start)
    result = []
    for index in range(header.nb_snapshots):
        head_bytes = window.get(position, _HEAD)
        if len(head_bytes) < _HEAD:
            raise ImageError(file.path, f"snapshot table entry {index} lies beyond the file")
        head = SNAPSHOT_ENTRY_HEAD.parse(head_bytes)
        if head.extra_size > _MAX_EXTRA:
            raise ImageError(
                file.path,
                f"snapshot table entry {index} has {head.extra_size} bytes of extra data, "
                f"more than {_MAX_EXTRA}",
            )
        length = _HEAD + head.extra_size + head.id_size + head.name_size
        raw = window.get(position, length)
        if len(raw) < length:
            raise ImageError(file.path, f"snapshot table entry {index} ends beyond the file")
        position += -(-length // 8) * 8
        if position - start > _MAX_TABLE:
            raise ImageError(file.path, f"snapshot table is larger than {_MAX_TABLE} bytes")
        # The padding of the very last entry need not be in the file.
        result.append(
            _snapshot(SNAPSHOT_ENTRY.parse(raw.ljust(-(-length // 8) * 8, b"\0")), header)
        )
    return result


def _snapshot(entry: Any, header: Header) -> Snapshot:
    """Extra fields count only if the entry's extra data reaches their end."""
    size = entry.extra_size
    extra = SNAPSHOT_EXTRA.parse(entry.extra[:24].ljust(24, b"\0"))
    icount = extra.icount if size >= 24 and extra.icount != _NO_ICOUNT else None
    return Snapshot(
        id=text_of(entry.id),
        name=text_of(entry.name),
        date_sec=entry.date_sec,
        date_nsec=entry.date_nsec,
        vm_clock_nsec=entry.vm_clock_nsec,
        vm_state_size=extra.vm_state_size if size >= 8 else entry.vm_state_size,
        disk_size=extra.disk_size if size >= 16 else header.size,
        icount=icount,
        l1_table_offset=entry.l1_table_offset,
        l1_size=entry.l1_size,
    )


def find_snapshot(file: HostFile, header: Header, wanted: str) -> Snapshot:
    """The snapshot with this id, or, as qemu-img does, else with this name.

    Its own L1 table is judged as qemu's `qcow2_snapshot_load_tmp` does, so that one broken
    entry spoils only its own snapshot.

    Raises: `ImageError` when there is none, or several of that name; when its L1 table is
        not cluster-aligned or larger than 32 MiB.
    """
    every = read_snapshots(file, header)
    by_id = [each for each in every if each.id == wanted]
    found = by_id or [each for each in every if each.name == wanted]
    if len(found) == 1:
        _require_l1(file, header, found[0])
        return found[0]
    if found:
        raise ImageError(
            file.path, f"has {len(found)} snapshots named {wanted!r}", "name one by its id"
        )
    known = ", ".join(each.name for each in every[:8]) or "none"
    raise ImageError(file.path, f"has no snapshot {wanted!r}; it has: {known}", "")


def _require_l1(file: HostFile, header: Header, snapshot: Snapshot) -> None:
    offset, size = snapshot.l1_table_offset, snapshot.l1_size * 8
    if offset % header.cluster_size:
        why = f"an L1 table at offset {offset}, which is not cluster-aligned"
    elif size > _MAX_L1:
        why = f"an L1 table of {size} bytes, more than {_MAX_L1}"
    else:
        return
    raise ImageError(file.path, f"snapshot {snapshot.name!r} has {why}")
