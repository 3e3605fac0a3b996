"""Which file this is, and whether it is as we left it: what a journal keeps of each file."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from qchain.hostfile import HostFile

__all__ = ["FileState", "state_of"]

_HEADER = 64 << 10
"""Bytes digested: the header cluster of all usual images, names and offsets included."""


@dataclass(frozen=True, slots=True)
class FileState:
    """A file at one moment: bytes, nanoseconds, SHA-256 of its first 64 KiB in hex.

    Whatever writes to a file changes its mtime; that it is the same file under another
    device number, size and digest say.
    """

    size: int
    mtime_ns: int
    digest: str

    def same_content(self, other: FileState) -> bool:
        """Equal but for the times, as far as that can be told from a header."""
        return (self.size, self.digest) == (other.size, other.digest)


def state_of(file: HostFile) -> FileState:
    """How `file` is now, whatever was known of it when it was opened."""
    status = os.fstat(file.fd)
    size = os.lseek(file.fd, 0, os.SEEK_END) if file.is_block_device else status.st_size
    # The time of a device node says nothing of what is on the device.
    mtime = 0 if file.is_block_device else status.st_mtime_ns
    digest = hashlib.sha256(os.pread(file.fd, _HEADER, 0)).hexdigest()
    return FileState(size, mtime, digest)
