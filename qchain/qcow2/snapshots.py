"""The internal snapshots of one image.

Source: the qcow2 specification, "Snapshots"; limits of qemu's
`qcow2_do_read_snapshots`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qchain.errors import ImageError
from qchain.hostfile import HostFile
from qchain.qcow2.extensions import text_of
from qchain.qcow2.header import Header
from qchain.qcow2.header_limits import MAX_SNAPSHOTS
from qchain.qcow2.heads import SNAPSHOT_HEAD, SnapshotHead, snapshot_extra
from qchain.qcow2.windows import Window

__all__ = ["Snapshot", "find_snapshot", "read_snapshots"]

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
        head_bytes = window.get(position, SNAPSHOT_HEAD)
        if len(head_bytes) < SNAPSHOT_HEAD:
            raise ImageError(file.path, f"snapshot table entry {index} lies beyond the file")
        head = SnapshotHead.parse(head_bytes)
        if head.extra_size > _MAX_EXTRA:
            raise ImageError(
                file.path,
                f"snapshot table entry {index} has {head.extra_size} bytes of extra data, "
                f"more than {_MAX_EXTRA}",
            )
        length = SNAPSHOT_HEAD + head.extra_size + head.id_size + head.name_size
        raw = window.get(position, length)
        if len(raw) < length:
            raise ImageError(file.path, f"snapshot table entry {index} ends beyond the file")
        position += -(-length // 8) * 8
        if position - start > _MAX_TABLE:
            raise ImageError(file.path, f"snapshot table is larger than {_MAX_TABLE} bytes")
        result.append(_snapshot(head, raw[SNAPSHOT_HEAD:], header))
    return result


def _snapshot(head: SnapshotHead, rest: bytes, header: Header) -> Snapshot:
    """Extra fields count only if the entry's extra data reaches their end."""
    size = head.extra_size
    vm_state_size, disk_size, icount = snapshot_extra(rest[:size])
    name_start = size + head.id_size
    return Snapshot(
        id=text_of(rest[size:name_start]),
        name=text_of(rest[name_start : name_start + head.name_size]),
        date_sec=head.date_sec,
        date_nsec=head.date_nsec,
        vm_clock_nsec=head.vm_clock_nsec,
        vm_state_size=vm_state_size if size >= 8 else head.vm_state_size,
        disk_size=disk_size if size >= 16 else header.size,
        icount=icount if size >= 24 and icount != _NO_ICOUNT else None,
        l1_table_offset=head.l1_table_offset,
        l1_size=head.l1_size,
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
