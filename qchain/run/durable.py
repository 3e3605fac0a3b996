"""Changes of files and directories that are on the disk when the call returns.

A rename is atomic, but neither it nor the file's data is durable before both the
file and the directory have been flushed. A flush that failed once is not tried
again: the kernel has then marked the lost pages as clean, and a second fsync would
report success (see "Can applications recover from fsync failures?", USENIX ATC 2020).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qchain.errors import FailedMidway

__all__ = [
    "discard_unwritten",
    "fsync_directory",
    "fsync_file",
    "fsync_open",
    "rename_durably",
    "unlink_durably",
    "write_durably",
]

# All functions raise `FailedMidway`, naming the file, when the system refuses.


def fsync_file(path: Path) -> None:
    """Flush what anybody wrote to `path`, a regular file or a block device."""
    _flush(path, os.O_RDONLY)


def fsync_open(fd: int, path: Path) -> None:
    """Flush the file of `path` through a descriptor that was open before it was written to.

    The kernel tells of a write-back that failed once per descriptor that was open then: one
    opened later is told nothing when somebody else has heard of it already.
    """
    with _told(path, "flush"):
        os.fsync(fd)


def fsync_directory(path: Path) -> None:
    """Flush the names in the directory `path`."""
    _flush(path, os.O_RDONLY | os.O_DIRECTORY)


def rename_durably(source: Path, target: Path) -> None:
    """Flush `source`, put it in the place of `target` in one step, flush both directories.

    The flush comes first: a name must never lead to data that is not there yet.
    """
    fsync_file(source)
    with _told(target, "rename to it"):
        source.rename(target)
    fsync_directory(target.parent)
    if source.parent != target.parent:
        fsync_directory(source.parent)


def unlink_durably(path: Path) -> None:
    """Remove a name that may be gone already (a repeated step); flush the directory."""
    with _told(path, "remove"):
        path.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """`path` holds all of `data`, or what it held before; never a part."""
    new = path.with_name(f"{path.name}.new")
    with _told(path, "write"):
        # A new file, never one that somebody else has put there and could still write to.
        new.unlink(missing_ok=True)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(fd, "wb") as file:
                # Tells `discard_unwritten` that somebody is at it.
                with contextlib.suppress(OSError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.write(data)
                file.flush()
                rename_durably(new, path)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink()
            raise


def discard_unwritten(path: Path) -> None:
    """Remove `path`, what a killed `write_durably` left; not while one is under way."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_uid in (os.geteuid(), 0):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        finally:
            os.close(fd)


def _flush(path: Path, flags: int) -> None:
    with _told(path, "flush"):
        # O_NONBLOCK: opening must not wait where a name has become a FIFO.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def _told(path: Path, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise FailedMidway(path, f"cannot {action}: {reason}") from None
