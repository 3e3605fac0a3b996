"""Free space while a merge runs: it was enough when the merge was planned; others write too.

A merge that needs more than there is stops before the last byte is gone, for a guest beside it
would stop with it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from qchain.errors import FailedMidway

__all__ = ["Room", "shortage_told"]

_FULL = tuple(os.strerror(code).lower() for code in (errno.ENOSPC, errno.EDQUOT))


class Room:
    """What the file at `path` may still take: at most `needed` bytes more than at first."""

    def __init__(self, path: Path, needed: int) -> None:
        self.path, self.needed = path, needed
        self._first = _taken(path)

    def left_to_take(self) -> int:
        """Bytes that the file may still need."""
        return max(0, self.needed - max(0, _taken(self.path) - self._first))

    def require(self) -> None:
        """Raise `FailedMidway` when the file system has less than may still be needed."""
        wanted, free = self.left_to_take(), self.free()
        if free is not None and wanted > free:
            raise FailedMidway(
                self.path.parent,
                f"up to {wanted} bytes are still needed there and only {free} are free any more",
            )

    def free(self) -> int | None:
        """Bytes that are free there; None where it cannot be told."""
        try:
            found = os.statvfs(self.path.parent)
        except OSError:
            return None
        return found.f_bavail * found.f_frsize


def shortage_told(why: str, room: Room | None) -> str:
    """`why` a step failed; for a full disk or quota also how much more was needed."""
    if room is None or not any(word in why.lower() for word in _FULL):
        return why
    free = room.free()
    known = "" if free is None else f", {free} are free"
    return f"{why}; up to {room.left_to_take()} bytes more are needed in {room.path.parent}{known}"


def _taken(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0  # a new file that is not there yet
