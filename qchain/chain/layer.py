"""Layers: an image in its place in a chain, and what it allocates in a window.

A window is a guest range [start, end), start a multiple of 2 MiB (the largest
cluster) or of the layer's own granularity. A layer answers in `Cells`, arrays
at its own granularity; nothing is ever held for the whole disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from qchain.hostfile import HostFile
from qchain.qcow2.entries import (
    NO_HOST,
    SUBCLUSTERS,
    Kind,
    allocated_extended,
    allocated_standard,
    decode_extended,
    decode_standard,
    zero_extended,
    zero_standard,
)
from qchain.qcow2.header import Header
from qchain.qcow2.snapshots import find_snapshot
from qchain.qcow2.tables import MapTables

if TYPE_CHECKING:
    from qchain.qcow2.luks import LuksCipher

__all__ = ["Backing", "Cells", "Layer", "Masks", "Qcow2Layer", "RawLayer", "close_layers"]


@dataclass(frozen=True, slots=True)
class Backing:
    """What an image records of its backing file: the name as it stands, and the format."""

    name: str
    format: str | None


@dataclass(slots=True)
class Cells:
    """The state of consecutive equal pieces of a window.

    Attributes:
        unit: bytes per cell.
        kind: shape (n,), values of `Kind`.
        host: shape (n,), host offset of each cell (`NO_HOST`: none; for
            compressed cells the cluster's descriptor).
    """

    unit: int
    kind: npt.NDArray[np.uint8]
    host: npt.NDArray[np.uint64]

    def refine(self, unit: int) -> Cells:
        """The same state in cells of `unit` bytes, which must divide the present unit."""
        factor = self.unit // unit
        if factor == 1:
            return self
        kind = np.repeat(self.kind, factor)
        host = np.repeat(self.host, factor)
        moves = (host != NO_HOST) & (kind != Kind.COMPRESSED)
        within = np.tile(np.arange(factor, dtype=np.uint64) * np.uint64(unit), len(self.kind))
        host[moves] += within[moves]
        return Cells(unit, kind, host)


@dataclass(slots=True)
class Masks:
    """Allocation of consecutive cells of `unit` bytes.

    `allocated`: shape (n,), zero clusters included (a hole of a raw image is not
    allocated). `zero`: shape (n,), or None where no cell is a zero cluster. `packed`:
    whether any cell may be compressed (told along with `zero` only).
    """

    unit: int
    allocated: npt.NDArray[np.bool_]
    zero: npt.NDArray[np.bool_] | None
    packed: bool = True


class Layer(Protocol):
    """What the rest of the library knows of a layer, whatever its format.

    `size` is the virtual size in bytes; `terminal` says that nothing below can
    show through (raw); `cut` that data was read which lies beyond the end of its file.
    """

    path: Path
    format: str
    file: HostFile
    size: int
    granularity: int
    terminal: bool
    cut: bool
    backing: Backing | None
    header: Header | None

    def next_used(self, start: int) -> int:
        """Guest offset up to which, from `start` on, nothing at all is allocated.

        `start` itself where something may be; the layer's size, or more, where nothing follows.
        """
        ...

    def cells(self, start: int, end: int) -> Cells | None:
        """The state of the window; None when this layer allocates nothing in it."""
        ...

    def masks(self, start: int, end: int, zeroes: bool = False) -> Masks | None:
        """Which cells are allocated, and which of them are zero; faster than `cells`."""
        ...

    @property
    def data(self) -> HostFile:
        """The file that guest data is read from."""
        ...

    def read_data(self, view: memoryview, offset: int) -> None:
        """Fill `view` with guest data at host `offset` (decrypted).

        What lies beyond the file's end is zeroes, as in qemu (before decrypting).
        """
        ...


def close_layers(layers: Iterable[Layer]) -> None:
    """Close the files of the layers; closing twice is fine."""
    for layer in layers:
        layer.data.close()
        layer.file.close()


def _read_whole(file: HostFile, view: memoryview, offset: int) -> bool:
    """Fill `view`, with zeroes beyond the end of the file; whether it held everything."""
    done = file.pread_into(view, offset)
    if done < len(view):
        view[done:] = bytes(len(view) - done)
        return False
    return True


class Qcow2Layer:
    """A qcow2 image as a layer."""

    format = "qcow2"
    terminal = False
    cut = False

    def __init__(
        self,
        path: Path,
        file: HostFile,
        header: Header,
        data_file: HostFile | None = None,
        snapshot: str | None = None,
    ) -> None:
        self.path = path
        self.file = file
        self.header: Header | None = header
        self.size = header.size
        self.cluster_size = header.cluster_size
        self.cluster_bits = header.cluster_bits
        self.compression = header.compression
        self.granularity = header.cluster_size // (32 if header.extended_l2 else 1)
        self.backing = (
            None
            if header.backing_name is None
            else Backing(header.backing_name, header.backing_format)
        )
        self.extended = header.extended_l2
        self.version = header.version
        self.data_file = data_file
        self.cipher: LuksCipher | None = None
        l1_offset, l1_size = header.l1_table_offset, header.l1_size
        if snapshot is not None:
            point = find_snapshot(file, header, snapshot)
            self.size = point.disk_size // 512 * 512
            l1_offset, l1_size = point.l1_table_offset, point.l1_size
        self.tables = MapTables(file, header, l1_offset, l1_size, self.size)

    @property
    def data(self) -> HostFile:
        return self.data_file or self.file

    def read_data(self, view: memoryview, offset: int) -> None:
        if self.cipher is None:
            if not _read_whole(self.data, view, offset):
                self.cut = True
        else:
            self.cipher.read_into(view, offset, self.data)

    def _clusters(self, start: int, end: int) -> tuple[int, int]:
        end = min(end, self.size)
        return start >> self.cluster_bits, -(-end >> self.cluster_bits)

    def next_used(self, start: int) -> int:
        return max(start, self.tables.next_table(start >> self.cluster_bits) << self.cluster_bits)

    def cells(self, start: int, end: int) -> Cells | None:
        if start >= self.size:
            return None
        first, last = self._clusters(start, end)
        entries = self.tables.entries(first, last)
        if entries is None:
            return None
        external = self.data_file is not None
        if self.extended:
            kind, host = decode_extended(
                entries, cluster_bits=self.cluster_bits, data_file=external
            )
        else:
            kind, host = decode_standard(
                entries,
                cluster_bits=self.cluster_bits,
                version=self.version,
                data_file=external,
            )
        if external or self.extended:
            self._distrust(first, kind, host)
        skip = (start - (first << self.cluster_bits)) // self.granularity
        return Cells(self.granularity, kind[skip:], host[skip:])

    def _distrust(
        self, first: int, kind: npt.NDArray[np.uint8], host: npt.NDArray[np.uint64]
    ) -> None:
        """Mark what qemu refuses for more than the (sub)cluster's own bits.

        Source: `qcow2_get_host_offset`, `qcow2_get_subcluster_type`.
        """
        if self.data_file is not None:
            # An external data file holds every cluster at its guest offset.
            start = np.uint64(first << self.cluster_bits)
            step = np.uint64(self.granularity)
            guest = start + np.arange(len(host), dtype=np.uint64) * step
            plain_zero = (host == 0) & (kind == Kind.ZERO)
            kind[(host != NO_HOST) & (host != guest) & ~plain_zero] = Kind.INVALID
        if self.extended:
            # One impossible subcluster spoils its cluster.
            bad = (kind == Kind.INVALID).reshape(-1, SUBCLUSTERS).any(axis=1)
            if bad.any():
                kind[np.repeat(bad, SUBCLUSTERS)] = Kind.INVALID

    def masks(self, start: int, end: int, zeroes: bool = False) -> Masks | None:
        if start >= self.size:
            return None
        first, last = self._clusters(start, end)
        raw = self.tables.raw_entries(first, last, scratch=True)
        if raw is None:
            return None
        zero = None
        packed = True
        if self.extended:
            allocated = allocated_extended(raw)
            if zeroes:
                zero = zero_extended(raw)
        else:
            external = self.data_file is not None
            allocated = allocated_standard(raw, data_file=external, overwrite=True)
            if zeroes:
                zero, packed = zero_standard(raw)
        skip = (start - (first << self.cluster_bits)) // self.granularity
        zero = None if zero is None else zero[skip:]
        return Masks(self.granularity, allocated[skip:], zero, packed)


class RawLayer:
    """A raw image as a layer: data where the filesystem says so (SEEK_DATA), else zeroes."""

    format = "raw"
    terminal = True
    cut = False
    header: Header | None = None
    backing: Backing | None = None

    def __init__(self, path: Path, file: HostFile) -> None:
        self.path = path
        self.file = file
        # As qemu: the size of a raw image is rounded up to whole 512-byte sectors.
        self.size = -(-file.size // 512) * 512
        self.granularity = 4096

    @property
    def data(self) -> HostFile:
        return self.file

    def read_data(self, view: memoryview, offset: int) -> None:
        _read_whole(self.file, view, offset)

    def next_used(self, start: int) -> int:
        return next((low for low, _ in self.file.data_ranges(start, self.size)), self.size)

    def _ranges(self, start: int, end: int) -> tuple[int, list[tuple[int, int]]]:
        # The last sector of an unaligned file is data as a whole.
        found = [
            (low // 512 * 512, -(-high // 512) * 512)
            for low, high in self.file.data_ranges(start, end)
        ]
        unit = end - start
        for low, high in found:
            unit = math.gcd(unit, math.gcd(low - start, high - start))
        return unit, found

    def cells(self, start: int, end: int) -> Cells | None:
        end = min(end, self.size)
        if start >= end:
            return None
        unit, found = self._ranges(start, end)
        count = (end - start) // unit
        kind = np.full(count, Kind.ZERO, np.uint8)
        for low, high in found:
            kind[(low - start) // unit : (high - start) // unit] = Kind.DATA
        host = np.arange(count, dtype=np.uint64) * np.uint64(unit) + np.uint64(start)
        return Cells(unit, kind, host)

    def masks(self, start: int, end: int, zeroes: bool = False) -> Masks | None:
        end = min(end, self.size)
        if start >= end:
            return None
        unit, found = self._ranges(start, end)
        if not found:
            return None
        allocated = np.zeros((end - start) // unit, bool)
        for low, high in found:
            allocated[(low - start) // unit : (high - start) // unit] = True
        return Masks(unit, allocated, None, packed=False)
