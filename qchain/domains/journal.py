"""The journal of a change to a domain: what it is to end with, over files and records.

`.qchain-TOKEN.domain` beside the first active image; the merge that is part of it, if there is
one, has its own journal of the same token (`qchain.run.journal`). One JSON document, written
before anything is changed and never changed itself, for all that it asks for may be repeated:

    {"qchain_domain": 1, "token", "uri", "name", "uuid", "words": what is done,
     "before": RECORDS, "after": RECORDS, "make": [{"path", "below", "format", "keep"}],
     "actives": [path], "drop": [path], "gone": [{"path", "device", "inode"}],
     "options": {..}, "scan": [path], "allow": [path], "home": inode}
    RECORDS: {"domain": xml, "snapshots": [[name, xml]], "current": name | null}

Order: `make` (new overlays), then the records, then the merge that drops `drop` (its records
are changed right before its first name is), then `gone` (files that nobody needs).
`allow`: the directories of all its images.
In other directories of its images lie pointers: {"qchain_domain": 1, "see": path}.
It holds what the definition holds, passwords too: mode 0600, and believed only if it belongs
to the caller or to root.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qchain.chain.scan import DOMAIN_SUFFIX, WORK_PREFIX, unfinished_domains
from qchain.domains.apply import Records
from qchain.domains.records import real
from qchain.errors import ImageError, Refused
from qchain.hostfile import FileId
from qchain.plan.options import MergeOptions
from qchain.run.durable import unlink_durably, write_durably
from qchain.run.fields import listed, number, path_of, text
from qchain.run.private import require_ours

__all__ = ["MERGED", "Gone", "Job", "Make", "domain_journals_at", "read_job"]

FORMAT = 1
_LIMIT = 64 << 20  # bytes
_BROKEN = "look at it; if it is none of a change, remove it"


@dataclass(frozen=True, slots=True)
class Make:
    """A new overlay `path` over `below`; `keep`: the live image keeps its name (row T15).

    Then `path` is the live name, and `below` the name that the present live image gets.
    """

    path: Path
    below: Path
    format: str
    keep: bool = False


MERGED = FileId(0, 0)
"""Of a file whose name the merge before may give to another one."""


@dataclass(frozen=True, slots=True)
class Gone:
    """A file that is to be deleted, known by what it is; `MERGED`, where that is not known yet."""

    path: Path
    id: FileId


@dataclass(frozen=True)
class Job:
    """A change to a domain."""

    token: str
    uri: str
    name: str
    uuid: str
    words: str
    before: Records
    after: Records
    make: tuple[Make, ...] = ()
    actives: tuple[Path, ...] = ()
    drop: tuple[Path, ...] = ()
    gone: tuple[Gone, ...] = ()
    options: MergeOptions = field(default_factory=MergeOptions)
    allow: tuple[Path, ...] = ()
    home: Path = field(default_factory=Path)

    @property
    def path(self) -> Path:
        return self.home / f"{WORK_PREFIX}{self.token}{DOMAIN_SUFFIX}"

    def files(self) -> set[Path]:
        """All images that it is about."""
        found = {*self.actives, *self.drop, *(each.path for each in self.gone)}
        return found | {path for each in self.make for path in (each.path, each.below)}

    def write(self) -> None:
        """Durably; from here on it is to be finished, or put back."""
        document = json.dumps(self._document(), indent=1, ensure_ascii=True).encode("ascii")
        write_durably(self.path, document)
        for pointer in self._pointers():
            stored = {"qchain_domain": FORMAT, "see": str(self.path)}
            write_durably(pointer, json.dumps(stored).encode("ascii"))

    def remove(self) -> None:
        """Nothing is left to do."""
        for pointer in self._pointers():
            if pointer.parent.is_dir():
                unlink_durably(pointer)
        unlink_durably(self.path)

    def _pointers(self) -> list[Path]:
        places = {real(str(path.parent)) for path in self.files()}
        return sorted(Path(each, self.path.name) for each in places - {real(str(self.home))})

    def _document(self) -> dict[str, object]:
        options = self.options
        return {
            "qchain_domain": FORMAT,
            "token": self.token,
            "uri": self.uri,
            "name": self.name,
            "uuid": self.uuid,
            "words": self.words,
            "before": _records_json(self.before),
            "after": _records_json(self.after),
            "make": [
                {
                    "path": str(each.path),
                    "below": str(each.below),
                    "format": each.format,
                    "keep": each.keep,
                }
                for each in self.make
            ],
            "actives": [str(path) for path in self.actives],
            "drop": [str(path) for path in self.drop],
            "gone": [
                {"path": str(each.path), "device": each.id.device, "inode": each.id.inode}
                for each in self.gone
            ],
            "options": {
                "strategy": options.strategy,
                "prefer": options.prefer,
                "verify": options.verify,
                "exact": options.exact,
                "bitmaps": options.bitmaps,
            },
            "scan": [str(path.absolute()) for path in options.scan],
            "allow": [str(path) for path in self.allow],
            "home": self.home.stat().st_ino,
        }


def _records_json(records: Records) -> dict[str, object]:
    return {
        "domain": records.domain,
        "snapshots": [[name, xml] for name, xml in records.snapshots.items()],
        "current": records.current,
    }


def domain_journals_at(where: Path) -> list[Path]:
    """The journals that concern `where`: all of a directory, or those that name an image.

    Raises: `ImageError`, `Refused` for one that cannot be read or believed.
    """
    directory = where if where.is_dir() else where.absolute().parent
    found = sorted({_followed(path) for path in unfinished_domains([directory])})
    if where.is_dir():
        return found
    name = real(str(where))
    return [path for path in found if name in {real(str(each)) for each in read_job(path).files()}]


def _followed(path: Path) -> Path:
    stored = _parsed(path)
    if "see" not in stored:
        return path
    try:
        return path_of(stored["see"])
    except ValueError as error:
        raise ImageError(path, f"is not a journal of qchain: {error}", _BROKEN) from None


def read_job(path: Path) -> Job:
    """The journal at `path`.

    Raises: `ImageError` when it is none; `Refused` when it is not to be believed.
    """
    stored = _parsed(path)
    try:
        job = _job(path, stored)
    except (ValueError, KeyError, TypeError) as error:
        what = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ImageError(path, f"is not a journal of qchain: {what}", _BROKEN) from None
    if job.path.name != path.name or path.parent.stat().st_ino != number(stored["home"]):
        raise Refused(path, "was not written here: a copy, or moved", "recover the original")
    return job


def _parsed(path: Path) -> dict[str, Any]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ImageError(path, f"cannot be read: {why}", "run as its owner") from None
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Refused(path, "is no regular file", "look who put it there")
        require_ours(path, status)
        data = file.read(_LIMIT)
    try:
        stored = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(path, f"is not a journal of qchain: {error}", _BROKEN) from None
    if not isinstance(stored, dict) or stored.get("qchain_domain") != FORMAT:
        raise ImageError(path, "is not a journal of this version of qchain", _BROKEN)
    return stored


def _job(path: Path, stored: dict[str, Any]) -> Job:
    how = stored["options"]
    options = MergeOptions(
        strategy=text(how["strategy"]),
        prefer=text(how["prefer"]),
        verify=text(how["verify"]),
        exact=bool(how["exact"]),
        bitmaps=text(how["bitmaps"]),
        scan=_paths(stored["scan"]),
    )
    return Job(
        token=text(stored["token"]),
        uri=text(stored["uri"]),
        name=text(stored["name"]),
        uuid=text(stored["uuid"]),
        words=text(stored["words"]),
        before=_records(stored["before"]),
        after=_records(stored["after"]),
        make=tuple(
            Make(
                path_of(each["path"]),
                path_of(each["below"]),
                text(each["format"]),
                bool(each["keep"]),
            )
            for each in listed(stored["make"])
        ),
        actives=_paths(stored["actives"]),
        drop=_paths(stored["drop"]),
        gone=tuple(
            Gone(path_of(each["path"]), FileId(number(each["device"], -1), number(each["inode"])))
            for each in listed(stored["gone"])
        ),
        options=options,
        allow=_paths(stored["allow"]),
        home=path.parent,
    )


def _paths(stored: Any) -> tuple[Path, ...]:
    return tuple(path_of(each) for each in listed(stored))


def _records(stored: Any) -> Records:
    pairs: Iterable[Any] = listed(stored["snapshots"])
    current = stored["current"]
    found = {}
    for pair in pairs:
        name, xml = listed(pair)
        found[text(name)] = text(xml)
    return Records(text(stored["domain"]), found, None if current is None else text(current))
