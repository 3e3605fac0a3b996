"""What the native engine keeps of a target in the work directory, from its first write on.

    {"length": bytes of the file before, "before": its first 512 bytes, "sector": those that it
     is to have, or null as long as they are not known}

Both sectors in hex. The file is ours alone, and lies in a directory that is.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from qchain.errors import ImageError
from qchain.native.newheader import SECTOR
from qchain.qcow2.heads import HeaderV2
from qchain.run.durable import write_durably
from qchain.run.private import require_ours

__all__ = ["Pending", "pending_files", "read_pending", "write_pending"]

_MOST = 1 << 16


@dataclass(frozen=True, slots=True)
class Pending:
    """The target as it was (`length` in bytes, `before` its first sector) and as it will be."""

    length: int
    before: bytes
    next: bytes | None = None

    @property
    def sector(self) -> bytes:
        """The sector that it is to have. Raises `ImageError` when it is not known yet."""
        if self.next is None:
            raise ImageError("merge", "the new header is not written yet", "")
        return self.next

    def switched(self, present: bytes) -> bool:
        """Whether `present`, the first bytes of the target, lead to the new tables.

        Raises: `ImageError` where they lead to neither.
        """
        now, before = (HeaderV2.parse(raw).l1_table_offset for raw in (present, self.before))
        if now == before:
            return False
        if self.next is not None and now == HeaderV2.parse(self.next).l1_table_offset:
            return True
        raise ImageError("merge", "the target's header has changed since", "")


def pending_files(path: Path) -> tuple[Path, Path]:
    """What writing `path` may leave: itself, and what was to become it."""
    return path, path.with_name(f"{path.name}.new")


def write_pending(path: Path, pending: Pending) -> None:
    """Durably. Raises `FailedMidway`."""
    made = None if pending.next is None else pending.next.hex()
    document = {"length": pending.length, "before": pending.before.hex(), "sector": made}
    write_durably(path, json.dumps(document).encode("ascii"))


def read_pending(path: Path) -> Pending:
    """Raises: `Refused` when others can have written it, `ImageError` when it is broken,
    `FileNotFoundError`."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        require_ours(path, os.fstat(fd))
        raw = os.read(fd, _MOST)
    finally:
        os.close(fd)
    try:
        stored = json.loads(raw)
        length, before, made = stored["length"], stored["before"], stored["sector"]
        found = Pending(int(length), bytes.fromhex(before), made and bytes.fromhex(made))
    except (ValueError, KeyError, TypeError):
        raise ImageError(path, "is not what a merge keeps there", "") from None
    if len(found.before) != SECTOR or (found.next is not None and len(found.next) != SECTOR):
        raise ImageError(path, "is not what a merge keeps there", "")
    return found
