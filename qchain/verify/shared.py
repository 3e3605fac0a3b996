"""Data that two files share: the same blocks of the filesystem, as FIEMAP tells.

What a filesystem shares by reflink is read from one place, whichever file is asked: the same
bytes, without reading them. Only extents count that both files call shared, plainly stored
and written, and that have the same physical place.

Source: the kernel's Documentation/filesystems/fiemap.rst.
"""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer
from qchain.chain.resolve import Runs
from qchain.hostfile import FileId, HostFile
from qchain.qcow2.entries import Kind

__all__ = ["SharedExtents"]

Bools = npt.NDArray[np.bool_]
I64 = npt.NDArray[np.int64]

_FIEMAP = 0xC020660B
_HEAD = struct.Struct("=QQIIII")
_EXTENT = np.dtype(
    [("logical", "u8"), ("physical", "u8"), ("length", "u8"), ("reserved", "u8", 2),
     ("flags", "u4"), ("more", "u4", 3)]
)  # fmt: skip
_SYNC = 1
_LAST, _MERGED, _SHARED = 0x1, 0x1000, 0x2000
_AT_ONCE = 4096
_MOST = 1 << 18
"""Extents of a file that are kept; a file of more is read."""
_LONG = 1 << 20
"""Runs of several extents are looked at one by one from this length on (bytes)."""


@dataclass(frozen=True, slots=True)
class _Map:
    """The shared extents of a file, in order; arrays of shape (n,), in bytes."""

    start: I64
    end: I64
    physical: I64

    def at(self, offset: I64, length: I64) -> tuple[I64, Bools]:
        """Where on the filesystem each range lies, and which lie in one shared extent."""
        if not len(self.start):
            return offset, np.zeros(len(offset), bool)
        index = np.maximum(np.searchsorted(self.start, offset, "right") - 1, 0)
        inside = (offset >= self.start[index]) & (offset + length <= self.end[index])
        return self.physical[index] + offset - self.start[index], inside

    def pieces(self, offset: int, length: int) -> tuple[I64, I64]:
        """Where it is cut, from 0 on, and where each piece lies; empty if not all is shared."""
        first = int(np.searchsorted(self.end, offset, "right"))
        last = int(np.searchsorted(self.start, offset + length, "left"))
        start, end = self.start[first:last], self.end[first:last]
        whole = len(start) and start[0] <= offset and end[-1] >= offset + length
        if not whole or (start[1:] != end[:-1]).any():
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        low = np.maximum(start, offset)
        return low - offset, self.physical[first:last] + low - start


_NONE = _Map(*(np.zeros(0, np.int64),) * 3)


class SharedExtents:
    """What pairs of runs lie in the same blocks; each file's extents are asked for once."""

    def __init__(self) -> None:
        self._maps: dict[FileId, _Map] = {}

    def same(self, a: Sequence[Layer], b: Sequence[Layer], left: Runs, right: Runs) -> Bools:
        """Which runs of `left` (layers `a`) share all of their data with those of `right`."""
        out = np.zeros(len(left), bool)
        plain = (left.kind == Kind.DATA) & (right.kind == Kind.DATA)
        numbers = left.depth.astype(np.int64) * max(1, len(b)) + right.depth
        for number in np.unique(numbers[plain]).tolist():
            one, other = divmod(number, max(1, len(b)))
            x, y = a[one], b[other]
            encrypted = any(each.header and each.header.crypt_method for each in (x, y))
            if encrypted or x.data.id.device != y.data.id.device or x.data.id.device == -1:
                continue
            where = np.flatnonzero(plain & (numbers == number))
            out[where] = self._same(
                self._map(x.data),
                self._map(y.data),
                left.host[where].astype(np.int64),
                right.host[where].astype(np.int64),
                left.length[where],
            )
        return out

    def _same(self, x: _Map, y: _Map, a: I64, b: I64, length: I64) -> Bools:
        if not len(x.start) or not len(y.start):
            return np.zeros(len(a), bool)
        at_x, in_x = x.at(a, length)
        at_y, in_y = y.at(b, length)
        out: Bools = in_x & in_y & (at_x == at_y)
        for index in np.flatnonzero(~(in_x & in_y) & (length >= _LONG)).tolist():
            cut_x, phys_x = x.pieces(int(a[index]), int(length[index]))
            cut_y, phys_y = y.pieces(int(b[index]), int(length[index]))
            out[index] = bool(len(cut_x) and len(cut_y)) and _agree(cut_x, phys_x, cut_y, phys_y)
        return out

    def _map(self, file: HostFile) -> _Map:
        if file.id not in self._maps:
            self._maps[file.id] = _read(file)
        return self._maps[file.id]


def _agree(cut_x: I64, phys_x: I64, cut_y: I64, phys_y: I64) -> bool:
    """Whether both are at the same places, wherever either is cut."""
    cuts = np.unique(np.concatenate((cut_x, cut_y)))
    i, j = (np.searchsorted(each, cuts, "right") - 1 for each in (cut_x, cut_y))
    return bool((phys_x[i] + cuts - cut_x[i] == phys_y[j] + cuts - cut_y[j]).all())


def _read(file: HostFile) -> _Map:
    """The shared extents of a file; none where the filesystem does not tell, or too many."""
    found: list[npt.NDArray[np.void]] = []
    start, total = 0, 0
    while total <= _MOST:
        buffer = bytearray(_HEAD.size + _AT_ONCE * _EXTENT.itemsize)
        _HEAD.pack_into(buffer, 0, start, (1 << 64) - 1 - start, _SYNC, 0, _AT_ONCE, 0)
        try:
            fcntl.ioctl(file.fd, _FIEMAP, buffer, True)
        except OSError:
            return _NONE
        count = _HEAD.unpack_from(buffer)[3]
        extents = np.frombuffer(buffer, _EXTENT, count, _HEAD.size)
        found.append(extents)
        total += count
        if not count or int(extents["flags"][-1]) & _LAST:
            return _joined(np.concatenate(found))
        start = int(extents["logical"][-1] + extents["length"][-1])
    return _NONE


def _joined(extents: npt.NDArray[np.void]) -> _Map:
    flags = extents["flags"].astype(np.int64)
    plain = (flags & ~(_LAST | _MERGED)) == _SHARED
    start, physical, length = (
        extents[name][plain].astype(np.int64) for name in ("logical", "physical", "length")
    )
    if not len(start):
        return _NONE
    # Neighbours on both sides are one.
    apart = (start[1:] != start[:-1] + length[:-1]) | (physical[1:] != physical[:-1] + length[:-1])
    first = np.concatenate(([0], np.flatnonzero(apart) + 1))
    last = np.append(first[1:], len(start)) - 1
    return _Map(start[first], start[last] + length[last], physical[first])
