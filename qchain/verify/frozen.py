"""The view before: a copy of the map of an image that is about to be written to.

A merge writes to its target in place. What it adds hides what was there, but the
clusters that the target had stay where they are; so its old view can still be
read, given its old map. The exception, compressed clusters that a commit
partly overwrites (qemu frees them at once), is copied out beforehand.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Backing, Cells, Layer, Masks, Qcow2Layer
from qchain.chain.reader import fill
from qchain.chain.resolve import Runs, runs
from qchain.hostfile import HostFile
from qchain.qcow2.entries import NO_HOST, Kind
from qchain.qcow2.header import Header, read_header
from qchain.qcow2.tables import MapTables

__all__ = ["freeze", "frozen_view", "map_digest", "open_rescued", "rescue"]


def map_digest(path: Path) -> bytes:
    """A digest of what a change of names in the header of `path` must leave as it is.

    Which file it is, its virtual size, the L1 table and its place, the length (but qemu
    writes bitmaps anew whenever it closes an image).
    Raises: `ImageError` when it cannot be read.
    """
    with HostFile(path) as file:
        header = read_header(file)
        length = 0 if header.bitmaps_extension is not None else file.size
        table = (header.l1_table_offset, header.l1_size)
        told = (file.id, header.size, table, header.nb_snapshots, length)
        digest = hashlib.sha256(repr(told).encode())
        digest.update(file.pread(header.l1_table_offset, header.l1_size * 8))
    return digest.digest()


def freeze(layer: Qcow2Layer, into: Path) -> None:
    """Write the map of `layer` to the new file `into`: header cluster, L1, L2 tables.

    The offsets in its L2 entries are still those of the image's own file. The size is
    that of the image's metadata, 1/8192 of the data for 64K clusters. Made durable.
    """
    header = layer.header
    assert header is not None
    cluster = header.cluster_size
    l1 = layer.tables.l1
    room = -(-max(len(l1) * 8, 1) // cluster) * cluster
    new = np.zeros(len(l1), np.uint64)
    with _new_file(into) as out:
        first = bytearray(layer.file.pread(0, cluster).ljust(cluster, b"\0"))
        first[40:48] = cluster.to_bytes(8, "big")  # l1_table_offset
        out.write(first)
        out.seek(cluster + room)
        position = cluster + room
        for index in np.flatnonzero(l1).tolist():
            out.write(layer.file.pread(int(l1[index]), cluster).ljust(cluster, b"\0"))
            new[index] = position
            position += cluster
        out.seek(cluster)
        out.write(new.astype(">u8").tobytes())
        out.truncate(position)
        out.flush()
        os.fsync(out.fileno())


def _new_file(path: Path) -> BinaryIO:
    """`path`, made anew: never a file, or where a link leads, that somebody has put there."""
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb")


def frozen_view(layer: Qcow2Layer, copy: Path) -> Qcow2Layer:
    """`layer` as it was when `freeze` wrote `copy`: the old map over the file as it is.

    The copy may be deleted while the view is open.
    """
    file = HostFile(copy)
    header = read_header(file)
    old = Qcow2Layer(layer.path, file, header, layer.data_file)
    old.tables = MapTables(file, header, header.l1_table_offset, header.l1_size)
    old.file = layer.file  # where the data, compressed too, is read from
    return old


class RescuedLayer:
    """Clusters copied out of the way, as a layer of its own above the frozen target."""

    format = "qcow2"
    terminal = False
    cut = False
    header: Header | None = None
    backing: Backing | None = None

    def __init__(
        self, path: Path, size: int, unit: int, file: HostFile, clusters: npt.NDArray[np.int64]
    ) -> None:
        self.path = path
        self.size = size
        self.granularity = unit
        self.file = file
        self.clusters = clusters
        self.first = _data_start(len(clusters), unit)

    @property
    def data(self) -> HostFile:
        return self.file

    def read_data(self, view: memoryview, offset: int) -> None:
        self.file.pread_into(view, offset)

    def next_used(self, start: int) -> int:
        at = int(np.searchsorted(self.clusters, start // self.granularity))
        if at == len(self.clusters):
            return self.size
        return max(start, int(self.clusters[at]) * self.granularity)

    def cells(self, start: int, end: int) -> Cells | None:
        unit = self.granularity
        first, last = start // unit, -(-min(end, self.size) // unit)
        low, high = np.searchsorted(self.clusters, (first, last)).tolist()
        if low >= high or first >= last:
            return None
        kind = np.zeros(last - first, np.uint8)
        host = np.full(last - first, NO_HOST, np.uint64)
        where = self.clusters[low:high] - first
        kind[where] = Kind.DATA
        host[where] = np.uint64(self.first) + np.arange(low, high, dtype=np.uint64) * np.uint64(
            unit
        )
        return Cells(unit, kind, host)

    def masks(self, start: int, end: int, zeroes: bool = False) -> Masks | None:
        cells = self.cells(start, end)
        return None if cells is None else Masks(cells.unit, cells.kind == Kind.DATA, None)


def rescue(view: Sequence[Layer], target: int, granularity: int, into: Path) -> None:
    """Copy out the compressed clusters of `view[target]` that a commit partly overwrites.

    Args:
        view: the kept point, active first; `target` is the layer committed into.
        granularity: that of the commit; what it rounds out to may be written.

    `into` gets a count, the cluster numbers and the clusters (see `open_rescued`); where
    there are none, the usual case, nothing is written.
    """
    layer = view[target]
    assert isinstance(layer, Qcow2Layer)
    cluster = layer.cluster_size
    reach = max(granularity, cluster)
    risky: list[npt.NDArray[np.int64]] = []
    for table in runs(view):
        mine = table.depth == target
        packed = mine & (table.kind == Kind.COMPRESSED)
        if not packed.any():
            continue
        # Windows are multiples of 2 MiB: no piece of `reach` crosses one.
        dirty = _pieces(table, table.depth < target, reach)
        clusters = _pieces(table, packed, cluster)
        risky.append(clusters[np.isin(clusters * cluster // reach, dirty)])
    found = np.unique(np.concatenate(risky)) if risky else np.zeros(0, np.int64)
    if not len(found):
        return
    with _new_file(into) as out:
        out.write(np.array([len(found), *found.tolist()], "<i8").tobytes())
        out.seek(_data_start(len(found), cluster))
        for index in found.tolist():
            content = bytearray(cluster)
            for table in runs([layer], index * cluster, (index + 1) * cluster):
                at = table.start - index * cluster
                fill([layer], table, memoryview(content), at)
            out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _data_start(count: int, cluster: int) -> int:
    """Where the clusters begin in a file of rescued ones."""
    return -(-(count + 1) * 8 // cluster) * cluster


def open_rescued(layer: Qcow2Layer, path: Path) -> RescuedLayer | None:
    """What `rescue` wrote for `layer` to `path`; None when it wrote nothing."""
    if not path.exists():
        return None
    file = HostFile(path)
    count = int.from_bytes(file.pread(0, 8), "little")
    clusters = np.frombuffer(file.pread(8, count * 8), "<i8").astype(np.int64)
    return RescuedLayer(layer.path, layer.size, layer.cluster_size, file, clusters)


def _pieces(table: Runs, which: npt.NDArray[np.bool_], unit: int) -> npt.NDArray[np.int64]:
    """Numbers of the pieces of `unit` bytes that the chosen runs touch."""
    low = table.start[which] // unit
    high = -(-(table.start[which] + table.length[which]) // unit)
    if not len(low):
        return np.zeros(0, np.int64)
    counts = high - low
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.unique(np.repeat(low, counts) + offsets)
