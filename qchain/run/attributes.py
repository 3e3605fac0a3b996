"""A file takes over who may use another: mode, owner, group, extended attributes.

Before a target takes a kept image's name it must be to everybody what the image
was: the guest's user can open it, SELinux lets it, and nobody new can read it. The
kept image reads through the target at this time, so the target is never closed to
all either: it only narrows to what both allow, and then widens to what the source
allows.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qchain.errors import FailedMidway

__all__ = ["open_to_all_of", "take_attributes"]

_ACCESS_ACL = "system.posix_acl_access"
# Digests of the file's own content and attributes: the source's would be wrong.
_OWN = {"security.ima", "security.evm"}
_ABSENT = {errno.ENODATA, errno.EOPNOTSUPP}


def take_attributes(source: Path, target: Path) -> None:
    """Give `target` the mode, owner, group and extended attributes of `source`.

    Extended attributes include ACLs, security labels and user.*; those that only
    `target` has are removed. At no moment can `target` be read or written by anybody
    who could not do so before with it, or with `source`. Times stay as they are.
    Repeating is harmless. Neither may be a symbolic link.

    Raises `FailedMidway` when the system does not let us, or `target`'s file system
    cannot hold an attribute; `target` is then no more open than either was.
    """
    with _told(source, "read its attributes"), _opened(source) as fd:
        wanted = os.fstat(fd)
        attributes = _read_all(fd)
    with _told(target, "set its attributes"), _opened(target) as fd:
        present = _read_all(fd)
        _narrow(fd, wanted, with_acl=_ACCESS_ACL in attributes or _ACCESS_ACL in present)
        has = os.fstat(fd)
        if (has.st_uid, has.st_gid) != (wanted.st_uid, wanted.st_gid):
            os.fchown(fd, wanted.st_uid, wanted.st_gid)
        for name in present.keys() - attributes.keys():
            _remove(fd, name)
        # The ACL last: with it the target opens.
        for name in sorted(attributes, key=lambda name: (name == _ACCESS_ACL, name)):
            if present.get(name) != attributes[name] or name == _ACCESS_ACL:
                os.setxattr(fd, name, attributes[name])
        # Where there is an ACL, the group's bits are its mask, in both files.
        os.fchmod(fd, stat.S_IMODE(wanted.st_mode))


def _narrow(fd: int, wanted: os.stat_result, *, with_acl: bool) -> None:
    """Group and others: only what the present mode and the wanted one both allow.

    The owner's bits stay: whoever owns the file now could set them anyway, and so
    can the one who owns the source.
    """
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    others = mode & wanted.st_mode & 0o077
    if with_acl:
        # The group's bits are the ACL's mask: none of its entries counts while it is
        # 0, and the group itself gets nothing when the ACL is removed. Those who are
        # 'others' for one file may be named, to deny them, in the ACL of the other.
        others = 0
    os.fchmod(fd, (mode & 0o700) | others)


def _read_all(fd: int) -> dict[str, bytes]:
    try:
        names = os.listxattr(fd)
    except OSError as error:
        if error.errno in _ABSENT:
            return {}
        raise
    found = {}
    for name in names:
        if name in _OWN:
            continue
        try:
            found[name] = os.getxattr(fd, name)
        except OSError as error:
            if error.errno not in _ABSENT:  # listed, but gone or not readable this way
                raise
    return found


def _remove(fd: int, name: str) -> None:
    try:
        os.removexattr(fd, name)
    except OSError as error:
        # A label cannot be removed where a security module is at work (EACCES,
        # EPERM); it has then no other file's label to take over.
        labelled = name.startswith("security.") and error.errno in (errno.EACCES, errno.EPERM)
        if error.errno not in _ABSENT and not labelled:
            raise


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    # One descriptor for all: the name may come to mean another file meanwhile.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _told(path: Path, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise FailedMidway(path, f"cannot {action}: {reason}") from None


def open_to_all_of(source: Path, alias: Path) -> None:
    """Whoever may open `source` may open `alias`, which holds no data but a name."""
    try:
        take_attributes(source, alias)
    except FailedMidway:
        # Who is not the owner of `source` cannot give it away.
        alias.chmod(0o644)
