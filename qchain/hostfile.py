"""An open host file: bounded reads, holes, identity. Never written to.

`HostFile` is what every reader works on. Only the open gate
(`qchain.chain.gate`) and tests create one from a name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qchain.errors import DataError, ImageError

__all__ = ["FileId", "HostFile", "mount_id", "names_in"]


@dataclass(frozen=True, slots=True)
class FileId:
    """Which file this is, whatever its name: device and inode."""

    device: int
    inode: int


class HostFile:
    """A regular file or block device, opened read-only.

    Raises `ImageError` when it is missing, unreadable, or neither a regular
    file nor a block device (a FIFO would block, a directory cannot be read).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path if isinstance(path, Path) else Path(path)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            self.fd = _open_untouched(path, flags)
        except OSError as error:
            raise ImageError(path, _reason(error), "check the name and its permissions") from None
        except ValueError:
            raise ImageError(path, "not a possible file name", "check the name") from None
        try:
            status = os.fstat(self.fd)
            if stat.S_ISREG(status.st_mode):
                self.size = status.st_size
            elif stat.S_ISBLK(status.st_mode):
                self.size = os.lseek(self.fd, 0, os.SEEK_END)
            else:
                raise ImageError(
                    path, "neither a regular file nor a block device", "name the image itself"
                )
        except BaseException:
            self.close()
            raise
        self.is_block_device = stat.S_ISBLK(status.st_mode)
        self.disk_size = status.st_blocks * 512
        self.id = FileId(status.st_dev, status.st_ino)
        if self.is_block_device:
            # Two device nodes may lead to one device: its number is its identity.
            self.id = FileId(-1, status.st_rdev)
        self.mtime_ns = status.st_mtime_ns

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        fd, self.fd = getattr(self, "fd", -1), -1
        if fd >= 0:
            # Forgotten first: an interrupt may come while a large file is being freed.
            os.close(fd)

    def __enter__(self) -> HostFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"HostFile({str(self.path)!r})"

    def pread(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; fewer only at the end of the file.

        `length` is bounded by the file's real size before anything is
        allocated, so a lying header cannot make us allocate more than exists.
        """
        length = min(length, self.size - offset)
        if length <= 0 or offset < 0:
            return b""
        try:
            data = os.pread(self.fd, length, offset)
            while len(data) < length:
                more = os.pread(self.fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            why = f"cannot read at offset {offset}: {_reason(error)}"
            raise DataError(self.path, why) from None
        return data

    def pread_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; returns the bytes read, fewer only at the end."""
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self.fd, [buffer[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise DataError(
                self.path, f"cannot read at offset {offset + done}: {_reason(error)}"
            ) from None
        return done

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The (start, end) of what is not a hole within [start, end), by SEEK_DATA.

        Where the filesystem cannot tell, everything is data.
        """
        position = start
        end = min(end, self.size)
        while position < end:
            try:
                data = os.lseek(self.fd, position, os.SEEK_DATA)
                if data >= end:
                    return
                hole = min(os.lseek(self.fd, data, os.SEEK_HOLE), end)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                data, hole = position, end
            yield data, hole
            position = hole


def names_in(directory: str | Path) -> list[str]:
    """The names in a directory, sorted; its access time is kept where the kernel allows.

    Raises: `OSError` when it cannot be read.
    """
    fd = _open_untouched(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        return sorted(os.listdir(fd))  # noqa: PTH208
    finally:
        os.close(fd)


def _open_untouched(path: str | Path, flags: int) -> int:
    """Open for reading without changing the access time: evidence must stay as it is.

    The kernel grants O_NOATIME only to the owner and to root.
    """
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:
        return os.open(path, flags)


def mount_id(path: Path) -> int | None:
    """Which mount a file or directory lies in; None where /proc does not tell.

    A filesystem may be mounted at several places: the device is the same then, and yet
    no rename and no hard link leads from one to another.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        told = Path(f"/proc/self/fdinfo/{fd}").read_text()
    except OSError:
        return None
    finally:
        os.close(fd)
    found = [line.split()[1] for line in told.splitlines() if line.startswith("mnt_id:")]
    return int(found[0]) if found else None


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower() if error.errno else str(error)
