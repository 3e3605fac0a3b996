"""A group merged into one of its own images: appended, then switched by one sector.

append   data, L2 tables, L1 table, refcounts go to clusters that were free; flush. Whatever
         part of that reaches the disk: the header leads to the old tables, clusters are leaked
switch   the first 512 bytes of the header; flush. Old tables or new ones, both whole
free     what only the old tables refer to (`qchain.native.free`). Stopped within: leaks
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.errors import ImageError, Refused
from qchain.hostfile import HostFile
from qchain.native.build import Builder, Progress
from qchain.native.clusters import Clusters, first_free
from qchain.native.merged import Group
from qchain.native.mover import Dry, Moved, Target
from qchain.native.newfile import Names, compression_of
from qchain.native.newheader import SECTOR, Tables, switched_header
from qchain.native.tables import Tables as L2Tables
from qchain.qcow2.header import Header, read_header
from qchain.qcow2.refcounts import read_refcount_table

__all__ = ["Place", "append", "header_of", "measured_append", "switch"]


@dataclass(frozen=True)
class Place:
    """What is merged into `members[into]`: the kept image first, over `below`."""

    members: Sequence[Layer]
    below: Sequence[Layer]
    into: int

    @property
    def target(self) -> Qcow2Layer:
        layer = self.members[self.into]
        assert isinstance(layer, Qcow2Layer)
        return layer


def append(
    fd: int, path: Path, place: Place, backing: Names, progress: Progress | None = None
) -> tuple[bytes, Moved]:
    """Write the merged map behind the end of the target, open at `fd`, and flush it.

    Args:
        backing: name and format of its new backing file, as the header is to have them.
        progress: called with (guest bytes done, guest bytes in all).

    Returns: the sector that switches to it.
    Raises: `Refused` where the header has no room; `ImageError` when an image cannot be
        read; `OSError`. The image reads as before then.
    """
    target = Target(fd, path)
    with HostFile(path) as file:
        header = read_header(file)
        where, _ = _appended(target, file, header, place, progress)
        area = file.pread(0, header.cluster_size)
    try:
        sector, before = switched_header(area, header, where, *backing)
    except ValueError as error:
        raise Refused(path, str(error), "use --engine qemu-img") from None
    if before is not None:
        target.write(*before)
    target.flush()
    return sector, target.moved


def measured_append(place: Place) -> tuple[Moved, int]:
    """What `append` would do, all data being copied, and by how much the file grows.

    Raises: `ImageError` when the maps or refcounts cannot be read, or the result would be
        larger than the format allows.
    """
    layer = place.target
    assert layer.header is not None
    target = Dry(layer.file.fd)
    _, end = _appended(target, layer.file, layer.header, place, None)
    return target.moved, max(0, end - layer.file.size)


def _appended(
    target: Target,
    file: HostFile,
    header: Header,
    place: Place,
    progress: Progress | None,
) -> tuple[Tables, int]:
    """Everything but the header; where its tables are, and the end of the file."""
    layer, size = place.target, place.members[0].size
    cluster = header.cluster_size
    start = first_free(file, header)
    clusters = Clusters(
        target,
        header.cluster_bits,
        header.refcount_order,
        start,
        read_refcount_table(file, header),
        header.refcount_table_clusters * cluster // 8,
    )
    count = -(-size // cluster)
    tables = L2Tables(clusters, count, header.l2_entry_size // 8, layer.tables.l1)
    shorter = layer.size > size
    group = Group(
        place.members, place.below, size, place.into, cluster, layer.granularity,
        header.version >= 3,
    )  # fmt: skip
    Builder(group, clusters, tables, compression_of(header), progress, shorter).run()
    tables.close()
    # Always a new one: by it the switched header is known.
    l1_offset = tables.finish()
    placed = clusters.finish()
    refcounts = header.refcount_table_offset, header.refcount_table_clusters
    if placed is not None:
        refcounts = placed.offset, placed.size
    stored = header.stored_size if size == layer.size else size
    return Tables(stored, l1_offset, tables.size, *refcounts), clusters.at << header.cluster_bits


def header_of(path: Path, sector: bytes) -> Header:
    """The header that `path` has once `sector` is in it, read and judged.

    Raises: `ImageError` when it is none that can be read.
    """
    with HostFile(path) as file:
        rest = file.pread(SECTOR, read_header(file).cluster_size - SECTOR)
        length = file.size
    fd = os.memfd_create("header", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, length)
        os.pwrite(fd, sector + rest, 0)
        with HostFile(f"/proc/self/fd/{fd}") as made:
            header = read_header(made)
    finally:
        os.close(fd)
    header.require_readable(path)
    return header


def switch(fd: int, path: Path, sector: bytes) -> None:
    """One write, flushed: from here on the header leads to the new tables. Raises `OSError`."""
    if len(sector) != SECTOR:
        raise ImageError(path, "its new header is not one sector", "")
    target = Target(fd, path)
    target.write(0, sector)
    target.flush()
