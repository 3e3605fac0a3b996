"""Which images of a directory back on what: headers only, never the files they name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qchain.chain.references import references_of, whereabouts
from qchain.errors import ImageError
from qchain.hostfile import FileId, HostFile

__all__ = [
    "JOURNAL_SUFFIX",
    "WORK_PREFIX",
    "Overlay",
    "Unseen",
    "identity",
    "overlays_in",
    "unfinished",
]

WORK_PREFIX = ".qchain-"
"""Names of our own work directories and aliases; scans pass over them."""


JOURNAL_SUFFIX = ".journal"

SMALLEST_IMAGE = 64
"""Bytes: shorter than any header that can name a backing file."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """An image that refers to a file: `use` says how ("backs on").

    `backing_id`: which file that is; None where only its name can be known.
    """

    path: Path
    id: FileId
    backing: Path
    backing_id: FileId | None
    use: str = "backs on"


@dataclass(frozen=True, slots=True)
class Unseen:
    """A file, or a directory, that could not be looked into: who knows what it backs on."""

    path: Path
    why: str


def identity(path: Path) -> FileId | None:
    """Which file a name leads to, without opening it; None when it leads nowhere."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    if status.st_rdev:
        return FileId(-1, status.st_rdev)
    return FileId(status.st_dev, status.st_ino)


def overlays_in(directories: Iterable[Path]) -> Iterator[Overlay | Unseen]:
    """Every image in the directories themselves (not below them) that refers to another file.

    Files that are no images are passed over, and so are names that lead nowhere: a scan
    looks for dangers, it does not judge. Each file costs one small read.
    """
    done: set[FileId] = set()
    for directory in directories:
        where = identity(directory)
        if where is None or where in done:
            continue
        done.add(where)
        try:
            with os.scandir(directory) as entries:
                names = sorted(entry.path for entry in entries if _is_file(entry))
        except OSError as error:
            yield Unseen(directory, f"cannot be listed: {(error.strerror or '').lower()}")
            continue
        for name in names:
            yield from _references(Path(name))


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.name.startswith(WORK_PREFIX) and entry.is_file()
    except OSError:
        return False  # a link to where we may not look: not in this directory


def _references(path: Path) -> Iterator[Overlay | Unseen]:
    try:
        with HostFile(path) as file:
            for found in references_of(file):
                for below, sure in whereabouts(found, path):
                    below_id = identity(below) if sure else None
                    if below_id is not None or not sure:
                        yield Overlay(path, file.id, below, below_id, found.use)
    except ImageError as error:
        with contextlib.suppress(OSError):  # gone meanwhile
            if path.stat().st_size >= SMALLEST_IMAGE:
                yield Unseen(path, error.why)


def unfinished(directories: Iterable[Path]) -> list[Path]:
    """The journals in the directories themselves: merges that are not finished."""
    found = {
        path
        for directory in directories
        for path in directory.glob(f"{WORK_PREFIX}*{JOURNAL_SUFFIX}")
        if path.is_file()
    }
    return sorted(found)
