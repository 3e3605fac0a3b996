"""Which images of a directory back on what: headers only, never the files they name."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qchain.chain.references import references_of, whereabouts
from qchain.errors import ImageError
from qchain.hostfile import FileId, HostFile, names_in

__all__ = [
    "DOMAIN_SUFFIX",
    "JOURNAL_SUFFIX",
    "WORK_PREFIX",
    "Overlay",
    "Unseen",
    "identity",
    "journal_names",
    "overlays_in",
    "places_of",
    "unfinished",
    "unfinished_domains",
    "unfinished_of",
]

WORK_PREFIX = ".qchain-"
"""Names of our own work directories and aliases; scans pass over them."""


JOURNAL_SUFFIX = ".journal"

DOMAIN_SUFFIX = ".domain"
"""Journals of changes to a domain of libvirt, of which a merge may be a part."""

_MAX_JOURNAL = 64 << 20

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
            names = names_in(directory)
        except OSError as error:
            yield Unseen(directory, f"cannot be listed: {(error.strerror or '').lower()}")
            continue
        for name in names:
            path = directory / name
            if not name.startswith(WORK_PREFIX) and _is_file(path):
                yield from _references(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # Links in a circle, or one into a directory that may not be searched.
        return False


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
    """The journals in the directories themselves: merges that are not finished.

    Pointers to a journal in another directory (see `qchain.run.journal`) count.
    """
    return _journals(directories, JOURNAL_SUFFIX)


def unfinished_domains(directories: Iterable[Path]) -> list[Path]:
    """The journals of changes to domains that are not finished, and pointers to them."""
    return _journals(directories, DOMAIN_SUFFIX)


def _journals(directories: Iterable[Path], suffix: str) -> list[Path]:
    found: set[Path] = set()
    for directory in directories:
        # Where nothing can be listed no merge of ours can have been.
        with contextlib.suppress(OSError, ValueError):
            found |= {
                directory / name
                for name in names_in(directory)
                if name.startswith(WORK_PREFIX) and name.endswith(suffix)
            }
    return sorted(path for path in found if path.is_file())


def unfinished_of(images: Iterable[Path]) -> list[Path]:
    """The journals beside some images that are about one of them: merges to be recovered.

    One that cannot be read might be.
    """
    paths = [path.absolute() for path in images]
    names = {os.path.realpath(path) for path in paths}
    found = []
    for journal in unfinished({place for path in paths for place in places_of(path)}):
        known = journal_names(journal)
        if known is None or not names.isdisjoint(known[0]):
            found.append(journal)
    return found


def places_of(image: Path) -> set[Path]:
    """The directories where a journal of a merge of `image` may lie: its own, and a link's."""
    return {image.absolute().parent, Path(os.path.realpath(image)).parent}


def journal_names(journal: Path) -> tuple[set[str], set[str]] | None:
    """The images that a journal, or the one it points to, is about, by their real names.

    Returns: those of the whole chain, and those of them that are merged; None where it
        cannot be told. It is only looked at here; whether it is to be believed is decided
        by who acts on it (`qchain.run.journal_file`).
    """
    try:
        stored = _document(journal)
        if "see" in stored:
            stored = _document(Path(stored["see"]))
        chain = [os.path.realpath(layer["path"]) for layer in stored["layers"]]
        merged: set[str] = set()
        for group in stored["groups"]:
            merged.update(chain[index] for index in group["line"][: group["count"]])
        return set(chain), merged
    except (ImageError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _document(journal: Path) -> Any:
    with HostFile(journal) as file:
        if file.size > _MAX_JOURNAL:
            raise ValueError("too long for a journal")
        return json.loads(file.pread(0, file.size))
