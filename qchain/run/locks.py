"""The locks by which qemu's processes keep out of each other's images.

qemu (`block/file-posix.c`, raw_apply_lock_bytes and raw_check_lock_bytes) puts
one-byte shared OFD locks on the image file: byte 100 + p says that the holder has
permission p, byte 200 + p that it shares permission p with nobody. To take a
permission is to take the locks first and then to look whether somebody else's
contradict them: nobody waits, and of two who come together at least one steps back.

A lock belongs to the open file (the descriptor and its copies): closing releases it,
and two descriptors of one process are two parties. Shared locks need a descriptor
open for reading, no more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qchain.errors import Refused

__all__ = [
    "LockState",
    "flock_holder",
    "hold_reader",
    "hold_writer",
    "holder_name",
    "keep_unshared",
    "probe",
    "release",
    "step_down",
]

_HAS, _DENIES = 100, 200
_READ, _WRITE, _WRITE_UNCHANGED, _RESIZE = range(4)
_ALL = tuple(range(4))

_FLOCK = "@hhqqi0q"  # struct flock: type, whence, start, length, pid; padded as in C
_NO_LOCKS = {errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_WAY_OUT = "shut the guest off, or wait until the other program has ended"


@dataclass(frozen=True, slots=True)
class LockState:
    """What others do with an image: `in_use` at all, by a `writer`.

    `known` is false where the file system has no such locks: then nothing is proven.
    """

    in_use: bool
    writer: bool
    known: bool = True


def probe(fd: int) -> LockState:
    """Who else uses the file open at `fd`, without taking any lock.

    Readers that share everything (`-U`) count as use. What `fd` itself holds does not.
    """
    try:
        writer = _held_by_others(fd, _HAS, (_WRITE, _RESIZE))
        in_use = writer or _held_by_others(fd, _HAS, (_READ, _WRITE_UNCHANGED))
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return LockState(in_use=False, writer=False, known=False)
        raise
    return LockState(in_use, writer)


def hold_reader(fd: int) -> None:
    """Read, and let nobody write or resize: the locks of a qemu that reads.

    Raises `Refused` when a writer has the file; then what `fd` held is unchanged.
    """
    _hold(fd, has=(_READ,), denies=(_WRITE, _RESIZE))


def hold_writer(fd: int) -> None:
    """Be the only user: the locks of a qemu that has the image open for writing.

    Any reader but a `-U` one contradicts. Raises `Refused` then, and what `fd` held
    is unchanged. A reader's locks held at the same `fd` are extended.
    """
    _hold(fd, has=(_READ, _WRITE, _RESIZE), denies=(_WRITE, _RESIZE))


def release(fd: int) -> None:
    """Give all up."""
    _set(fd, fcntl.F_UNLCK, (base + p for base in (_HAS, _DENIES) for p in _ALL))


def step_down(fd: int) -> None:
    """Be a reader again, after `hold_writer`."""
    _set(fd, fcntl.F_UNLCK, (_HAS + _WRITE, _HAS + _RESIZE))


def keep_unshared(fd: int) -> None:
    """Go on denying writers, but claim no consistent reading.

    commit writes below an intermediate, whose content is wrong in the meantime: with
    byte 100 held there by anybody it fails 'Failed to get shared "consistent read"
    lock' (measured with 7.2).
    """
    _set(fd, fcntl.F_UNLCK, (_HAS + p for p in _ALL))


def holder_name(fd: int) -> str | None:
    """'qemu-io (pid 123)' for a process that has qemu's locks on the file, if visible.

    /proc/locks shows no owner of an OFD lock (pid -1), so the descriptors of all
    processes are looked through: their fdinfo lists the locks. Without root only
    those of one's own processes are visible. This process is never named.
    """
    status = os.fstat(fd)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        # Processes end while one looks, and some are not ours to look into.
        with contextlib.suppress(OSError):
            for link in (process / "fd").iterdir():
                other = link.stat()
                if (other.st_dev, other.st_ino) != (status.st_dev, status.st_ino):
                    continue
                if _has_qemu_locks((process / "fdinfo" / link.name).read_text()):
                    name = (process / "comm").read_text().strip()
                    return f"{name} (pid {process.name})"
    return None


def flock_holder(fd: int) -> str | None:
    """'qchain (pid 123)' for a process that has a flock on the file, if it can be known.

    That lock names its owner, unlike an OFD lock: in /proc/locks, by device and inode.
    """
    status = os.fstat(fd)
    where = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            # 2: FLOCK  ADVISORY  WRITE 123 fe:00:4567 0 EOF; waiting ones have "->" before.
            words = line.split()
            if words[1] == "FLOCK" and words[5] == where:
                name = Path("/proc", words[4], "comm").read_text().strip()
                return f"{name} (pid {words[4]})"
    return None


def _has_qemu_locks(fdinfo: str) -> bool:
    # lock: 1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101
    ranges = re.findall(r"^lock:.* (\d+) (\d+|EOF)$", fdinfo, re.MULTILINE)
    for first, last in ranges:
        end = 1 << 62 if last == "EOF" else int(last)
        if any(int(first) <= base + p <= end for base in (_HAS, _DENIES) for p in _ALL):
            return True
    return False


def _hold(fd: int, has: tuple[int, ...], denies: tuple[int, ...]) -> None:
    wanted = [_HAS + p for p in has] + [_DENIES + p for p in denies]
    before = _own(fd)  # a step back leaves these
    try:
        _set(fd, fcntl.F_RDLCK, wanted)
        conflict = _held_by_others(fd, _DENIES, has) or _held_by_others(fd, _HAS, denies)
    except OSError as error:
        _set_quietly(fd, fcntl.F_UNLCK, (b for b in wanted if b not in before))
        if error.errno in _NO_LOCKS:
            raise Refused(
                _path(fd), "its file system has no locks", "use a file system that has them"
            ) from None
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        conflict = True  # an exclusive lock, which qemu never takes: somebody's own
    if conflict:
        _set_quietly(fd, fcntl.F_UNLCK, (b for b in wanted if b not in before))
        holder = holder_name(fd)
        raise Refused(_path(fd), f"in use by {holder or 'another process'}", _WAY_OUT)


def _own(fd: int) -> set[int]:
    """The bytes on which `fd` holds locks, by the kernel's list."""
    try:
        fdinfo = Path(f"/proc/self/fdinfo/{fd}").read_text()
    except OSError:
        return set()
    bytes_: set[int] = set()
    for first, last in re.findall(r"^lock:.* (\d+) (\d+)$", fdinfo, re.MULTILINE):
        bytes_.update(range(int(first), min(int(last), _DENIES + len(_ALL)) + 1))
    return bytes_


def _path(fd: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return f"descriptor {fd}"


def _set(fd: int, kind: int, places: Iterable[int]) -> None:
    for place in places:
        lock = struct.pack(_FLOCK, kind, os.SEEK_SET, place, 1, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)


def _set_quietly(fd: int, kind: int, places: Iterable[int]) -> None:
    with contextlib.suppress(OSError):
        _set(fd, kind, places)


def _held_by_others(fd: int, base: int, permissions: Iterable[int]) -> bool:
    for p in permissions:
        # F_WRLCK asks: would anybody's lock, shared ones included, be in the way?
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, base + p, 1, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)
        if struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK:
            return True
    return False
