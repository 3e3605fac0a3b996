"""Bytes put into the file that is written to: shared, copied by the kernel, or written.

Every change of that file goes through `Target`, so that a test may record it, or stop there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass

from qchain.errors import DataError
from qchain.hostfile import HostFile

__all__ = ["Dry", "Moved", "Target"]

_FICLONERANGE = 0x4020940D
_RANGE = struct.Struct("=qQQQ")
_BLOCK = 4096
"""What filesystems that share extents align them to, at least."""
_STEP = 16 << 20
"""The most that one call copies: an interrupt waits no longer."""
_PIECE = 1 << 20
_NOT_SHARED = frozenset(
    {
        errno.EOPNOTSUPP,
        errno.EXDEV,
        errno.EINVAL,
        errno.ENOTTY,
        errno.ENOSYS,
        errno.EPERM,
        errno.ETXTBSY,
        errno.EBADF,
    }
)
_NOT_COPIED = _NOT_SHARED | {errno.EIO}


@dataclass
class Moved:
    """What was done, as the calls told it: bytes shared, copied, written as tables and cuts."""

    shared: int = 0
    copied: int = 0
    written: int = 0
    calls: int = 0


class Target:
    """The file that receives, open for reading and writing as `fd`."""

    def __init__(self, fd: int, path: os.PathLike[str] | str) -> None:
        self.fd, self.path = fd, path
        self.moved = Moved()
        self._device = os.fstat(fd).st_dev
        self._shares = True
        self._copies: set[int] = set()
        """Descriptors from which the kernel does not copy to this file."""

    def read(self, offset: int, length: int) -> bytes:
        """What is there now; less at the end of the file."""
        out = b""
        while len(out) < length and (
            more := os.pread(self.fd, length - len(out), offset + len(out))
        ):
            out += more
        return out

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """All of `data` at `offset`. Raises `OSError`."""
        view = memoryview(data).cast("B")
        self.moved.written += len(view)
        self._write(offset, view)

    def _write(self, offset: int, view: memoryview) -> None:
        while len(view):
            self.moved.calls += 1
            done = os.pwrite(self.fd, view, offset)
            view, offset = view[done:], offset + done

    def bring(self, source: HostFile, start: int, offset: int, length: int) -> None:
        """`length` bytes of `source` from `start` on, to `offset`; zeroes stay beyond its end.

        What is at `offset` must read as zeroes.

        Raises: `OSError`; `DataError` when the source cannot be read.
        """
        length = min(length, source.size - start)
        if length <= 0:
            return
        done = self._share(source, start, offset, length)
        while done < length:
            count = self._copy(source.fd, start + done, offset + done, length - done)
            if count == 0:
                self._carry(source, start + done, offset + done, length - done)
                return
            done += count

    def _share(self, source: HostFile, start: int, offset: int, length: int) -> int:
        """Bytes, from the start on, that both files share now."""
        whole = length // _BLOCK * _BLOCK
        if not self._shares or source.id.device != self._device:
            return 0
        if not whole or (start | offset) % _BLOCK:
            return 0
        self.moved.calls += 1
        try:
            fcntl.ioctl(self.fd, _FICLONERANGE, _RANGE.pack(source.fd, start, whole, offset))
        except OSError as error:
            if error.errno not in _NOT_SHARED:
                raise
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS):
                self._shares = False
            return 0
        self.moved.shared += whole
        return whole

    def _copy(self, fd: int, start: int, offset: int, length: int) -> int:
        """Bytes that the kernel copied; 0 where it does not, or at the source's end."""
        if fd in self._copies:
            return 0
        self.moved.calls += 1
        try:
            done = os.copy_file_range(fd, self.fd, min(length, _STEP), start, offset)
        except OSError as error:
            if error.errno not in _NOT_COPIED:
                raise
            # An error of the disk shows again when the bytes are read.
            self._copies.add(fd)
            return 0
        self.moved.copied += done
        return done

    def _carry(self, source: HostFile, start: int, offset: int, length: int) -> None:
        """Through memory."""
        buffer = memoryview(bytearray(min(length, _PIECE)))
        done = 0
        while done < length:
            piece = buffer[: min(length - done, len(buffer))]
            count = source.pread_into(piece, start + done)
            if count == 0:
                raise DataError(source.path, f"ends at offset {start + done} all of a sudden")
            self._write(offset + done, piece[:count])
            self.moved.copied += count
            done += count

    def length(self) -> int:
        """Bytes of the file now."""
        return os.fstat(self.fd).st_size

    def reach(self, length: int) -> None:
        """Make the file at least this long; what is new reads as zeroes."""
        if self.length() < length:
            os.ftruncate(self.fd, length)

    def flush(self) -> None:
        """All of it is on the disk when this returns."""
        os.fsync(self.fd)


class Dry(Target):
    """A file that nothing is done to: what would be done is counted."""

    def __init__(self, fd: int = -1) -> None:
        self.fd, self.path = fd, ""
        self.moved = Moved()

    def read(self, offset: int, length: int) -> bytes:
        return super().read(offset, length) if self.fd >= 0 else b""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self.moved.written += len(data)
        self.moved.calls += 1

    def bring(self, source: HostFile, start: int, offset: int, length: int) -> None:
        self.count(min(length, max(0, source.size - start)), 0, 1)

    def count(self, copied: int, unpacked: int, calls: int) -> None:
        """Many at once: bytes of pieces that are copied, and of those that are unpacked."""
        self.moved.copied += copied
        self.moved.written += unpacked
        self.moved.calls += calls

    def reach(self, length: int) -> None:
        pass

    def flush(self) -> None:
        pass
