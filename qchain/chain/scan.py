"""Which images of a directory back on what: headers only, never the files they name."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qchain.chain.names import resolve_name
from qchain.errors import ImageError
from qchain.hostfile import FileId, HostFile, names_in
from qchain.qcow2.foreign import is_qcow2
from qchain.qcow2.header import read_header

__all__ = [
    "JOURNAL_SUFFIX",
    "WORK_PREFIX",
    "Overlay",
    "identity",
    "overlays_in",
    "unfinished",
    "unfinished_of",
]

WORK_PREFIX = ".qchain-"
"""Names of our own work directories and aliases; scans pass over them."""


JOURNAL_SUFFIX = ".journal"
_MAX_JOURNAL = 64 << 20


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
        for name in names_in(directory):
            path = directory / name
            found = None
            if not name.startswith(WORK_PREFIX) and _is_file(path):
                found = _overlay(path)
            if found is not None:
                yield found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # Links in a circle, or one into a directory that may not be searched.
        return False


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
    """The journals in the directories themselves: merges that are not finished."""
    found: set[Path] = set()
    for directory in directories:
        # Where nothing can be listed no merge of ours can have been.
        with contextlib.suppress(OSError, ValueError):
            found |= {
                directory / name
                for name in names_in(directory)
                if name.startswith(WORK_PREFIX) and name.endswith(JOURNAL_SUFFIX)
            }
    return sorted(path for path in found if path.is_file())


def unfinished_of(images: Iterable[Path]) -> list[Path]:
    """The journals beside some images that name one of them: merges to be recovered."""
    names = {os.path.abspath(image) for image in images}
    beside = unfinished({Path(name).parent for name in names})
    return [path for path in beside if _concerns(path, names)]


def _concerns(journal: Path, names: set[str]) -> bool:
    """Whether a journal names one of the files; one that cannot be read might."""
    try:
        with HostFile(journal) as file:
            if file.size > _MAX_JOURNAL:
                return True
            document = json.loads(file.pread(0, file.size))
        listed = {layer["path"] for group in document["groups"] for layer in group["layers"]}
    except (ImageError, ValueError, KeyError, TypeError, RecursionError):
        return True
    return not names.isdisjoint(listed)
