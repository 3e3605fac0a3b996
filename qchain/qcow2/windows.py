"""Bytes of a table whose entries have no fixed length, read in bounded pieces."""

from __future__ import annotations

from qchain.hostfile import HostFile

__all__ = ["Window"]

_PIECE = 1 << 17


class Window:
    """A piece of a file that moves along with the reader.

    Memory is one piece (128 KiB, or one entry if that is longer), whatever sizes
    the table announces.
    """

    def __init__(self, file: HostFile, start: int) -> None:
        self._file = file
        self._start = start
        self._piece = b""

    def get(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` of the file; fewer only at the end of the file."""
        begin = offset - self._start
        if begin < 0 or begin + length > len(self._piece):
            self._piece = self._file.pread(offset, max(length, _PIECE))
            self._start = offset
            begin = 0
        return self._piece[begin : begin + length]
