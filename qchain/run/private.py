"""Work files in a directory that may belong to somebody else: made new, never taken over.

Who owns a directory can put anything under any name in it. What is made here is made
exclusively and links are never followed; the directory that a stopped merge left is used
again only if it is ours.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qchain.errors import FailedMidway, Refused

__all__ = ["make_private", "open_private", "require_ours"]


def make_private(path: Path) -> None:
    """Make the directory `path`, for us alone; the one that we made before is as good.

    Raises: `FailedMidway` when something else has the name, `OSError`.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        status = path.lstat()
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if not ours or status.st_mode & 0o077:
            raise FailedMidway(path, "exists already, and was not made by this merge") from None


def require_ours(path: Path, status: os.stat_result) -> None:
    """What a file with this status says may be done: only we, or root, can have written it.

    Raises: `Refused`.
    """
    if status.st_uid not in (os.geteuid(), 0):
        raise Refused(
            path,
            f"belongs to another user (id {status.st_uid}), who could make it do anything",
            "do it as that user, or look at it and remove it",
        )
    if status.st_mode & 0o022:
        raise Refused(
            path,
            "others than its owner can write to it and could make it do anything",
            "look at it; if it is right, 'chmod 600' it",
        )


def open_private(path: Path) -> int:
    """A descriptor of the file `path`, made anew: whatever had the name loses it."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
