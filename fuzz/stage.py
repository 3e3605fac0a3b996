"""Mutants as files: each shape has its directory in memory, and only what differs is written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fixtures.draft import Draft
from fixtures.hostile import Drafts, furnish
from fixtures.shapes import Shape

__all__ = ["Stage", "place_for_files"]

_PIECE = 4096


def place_for_files() -> Path | None:
    """A directory whose files are in memory, where there is one."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else None


@dataclass
class _File:
    fd: int
    draft: Draft
    has_holes: bool
    """Holes tell something of a raw file."""


class Stage:
    """One shape on disk. `show` writes what its drafts hold, `clear` what the shape holds."""

    def __init__(self, directory: Path, shape: Shape) -> None:
        self.directory = directory
        self.drafts = Drafts(shape)
        self.image = directory / shape.active
        directory.mkdir()
        furnish(directory, shape.active)
        self._files: list[_File] = []
        for name, draft in self.drafts.files.items():
            fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            _write_whole(fd, bytes(draft))
            self._files.append(_File(fd, draft, shape.formats[name] == "raw"))

    def close(self) -> None:
        for file in self._files:
            os.close(file.fd)

    def show(self) -> None:
        """The files are now what the drafts are."""
        for file in self._files:
            patches = file.draft.patches()
            if os.fstat(file.fd).st_size != len(file.draft):
                os.ftruncate(file.fd, len(file.draft))
            for offset, data in patches:
                os.pwrite(file.fd, data, offset)

    def clear(self) -> None:
        """Drafts and files are what the shape is."""
        for file in self._files:
            touched = file.draft.undo()
            if sum(length for _, length in touched) >= _PIECE or (touched and file.has_holes):
                _write_whole(file.fd, bytes(file.draft))
                continue
            if os.fstat(file.fd).st_size != len(file.draft):
                os.ftruncate(file.fd, len(file.draft))
            for offset, length in touched:
                os.pwrite(file.fd, file.draft[offset : offset + length], offset)


def _write_whole(fd: int, data: bytes) -> None:
    """All of a file anew: pages of zeroes are holes."""
    os.ftruncate(fd, 0)
    os.ftruncate(fd, len(data))
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        if piece.count(0) < len(piece):
            os.pwrite(fd, piece, start)
