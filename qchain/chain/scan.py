"""Which images of a directory back on what: headers only, never the files they name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qchain.chain.names import resolve_name
from qchain.errors import ImageError
from qchain.hostfile import FileId, HostFile
from qchain.qcow2.foreign import is_qcow2
from qchain.qcow2.header import read_header

__all__ = [
    "JOURNAL_SUFFIX",
    "WORK_PREFIX",
    "Overlay",
    "identity",
    "journal_names",
    "overlays_in",
    "unfinished",
]

WORK_PREFIX = ".qchain-"
"""Names of our own work directories and aliases; scans pass over them."""


JOURNAL_SUFFIX = ".journal"


@dataclass(frozen=True, slots=True)
class Overlay:
    """An image that names a backing file which exists."""

    path: Path
    id: FileId
    backing: Path
    backing_id: FileId


def identity(path: Path) -> FileId | None:
    """Which file a name leads to, without opening it; None when it leads nowhere."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    if status.st_rdev:
        return FileId(-1, status.st_rdev)
    return FileId(status.st_dev, status.st_ino)


def overlays_in(directories: Iterable[Path]) -> Iterator[Overlay]:
    """Every overlay in the directories themselves (not below them).

    Files that cannot be read or are no images are passed over: a scan looks for
    dangers, it does not judge.
    """
    done: set[FileId] = set()
    for directory in directories:
        where = identity(directory)
        if where is None or where in done:
            continue
        done.add(where)
        with os.scandir(directory) as entries:
            names = sorted(
                entry.path
                for entry in entries
                if not entry.name.startswith(WORK_PREFIX) and entry.is_file()
            )
        for name in names:
            found = _overlay(Path(name))
            if found is not None:
                yield found


def _overlay(path: Path) -> Overlay | None:
    try:
        with HostFile(path) as file:
            if not is_qcow2(file.pread(0, 8)):
                return None
            header = read_header(file)
            if header.backing_name is None:
                return None
            backing = resolve_name(header.backing_name, path)
            backing_id = identity(backing)
            return None if backing_id is None else Overlay(path, file.id, backing, backing_id)
    except ImageError:
        return None


def unfinished(directories: Iterable[Path]) -> list[Path]:
    """The journals in the directories themselves: merges that are not finished.

    Pointers to a journal in another directory (see `qchain.run.journal`) count.
    """
    found = {
        path
        for directory in directories
        for path in directory.glob(f"{WORK_PREFIX}*{JOURNAL_SUFFIX}")
        if path.is_file()
    }
    return sorted(found)


def journal_names(journal: Path) -> tuple[set[str], set[str]] | None:
    """The images that a journal, or the one it points to, is about, by their real names.

    Returns: those of the whole chain, and those of them that are merged; None where it
        cannot be told. It is only looked at here; whether it is to be believed is decided
        by who acts on it (`qchain.run.journal_file`).
    """
    try:
        stored = json.loads(journal.read_bytes())
        if "see" in stored:
            stored = json.loads(Path(stored["see"]).read_bytes())
        chain = [os.path.realpath(layer["path"]) for layer in stored["layers"]]
        merged: set[str] = set()
        for group in stored["groups"]:
            kept, below = group["kept"], group["below"]
            merged.update(chain[kept : None if below is None else kept + below])
        return set(chain), merged
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
