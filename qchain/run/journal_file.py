"""Finding and reading journals: which are believed, and what one may make us do.

A journal is a list of what is to be renamed and deleted, so whoever may write one in a
directory could have `recover` do it for him. Hence it must belong to the caller or to
root, nobody else may be able to write to it, it lies where its active image is, and
its steps touch nothing but the images of the chain and work files beside them.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qchain.chain.scan import JOURNAL_SUFFIX, WORK_PREFIX, unfinished
from qchain.errors import ImageError, Refused
from qchain.hostfile import FileId
from qchain.plan.options import NAMES, VERIFY
from qchain.plan.stored import step_from_json
from qchain.run.fields import index, listed, number, one_of, path_of, text
from qchain.run.identity import FileState
from qchain.run.journal import FORMAT, GroupRecord, Journal, LayerRecord
from qchain.run.lawful import require_lawful
from qchain.run.private import require_ours

__all__ = ["find_journals", "layer_of", "read_journal", "unwritten"]

_LIMIT = 64 << 20  # bytes
_BROKEN = "look at it; if it is none of a merge, remove it"


def find_journals(directories: Iterable[Path]) -> list[Path]:
    """The journals of the directories themselves, and those that a pointer there leads to.

    Raises: `Refused`, `ImageError` for a file of that name that cannot be read or believed.
    """
    return sorted({_followed(path) for path in unfinished(directories)})


def unwritten(directory: Path) -> list[Path]:
    """What is left of journals that were killed while they were written for the first time."""
    suffix = f"{JOURNAL_SUFFIX}.new"
    return sorted(
        path
        for path in directory.glob(f"{WORK_PREFIX}*{suffix}")
        if path.is_file() and not path.with_name(path.name.removesuffix(".new")).exists()
    )


def _followed(path: Path) -> Path:
    stored = _parsed(path)
    if "see" not in stored:
        return path
    try:
        journal = path_of(stored["see"])
    except ValueError as error:
        raise ImageError(path, f"is not a journal of qchain: {error}", _BROKEN) from None
    if not os.path.lexists(journal):
        raise ImageError(
            path,
            f"leads to the journal {journal}, which is missing",
            "mount its directory; if that merge is over, remove this pointer",
        )
    return journal


def read_journal(path: Path) -> Journal:
    """The journal at `path`.

    Raises: `ImageError` when it is none, or of another format; `Refused` when it is not
        to be believed.
    """
    stored = _parsed(path)
    try:
        journal = _journal(path, stored)
    except ImageError as error:
        raise ImageError(path, f"is not a journal of qchain: {error.why}", _BROKEN) from None
    except (ValueError, KeyError, TypeError) as error:
        what = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ImageError(path, f"is not a journal of qchain: {what}", _BROKEN) from None
    require_lawful(journal)
    return journal


def _parsed(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(_believed(path))
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ImageError(path, f"is not a journal of qchain: {why}", _BROKEN) from None
    if not isinstance(stored, dict) or "qchain_journal" not in stored:
        raise ImageError(path, "is not a journal of qchain", _BROKEN)
    if stored["qchain_journal"] != FORMAT:
        said = str(stored["qchain_journal"])[:20]
        raise ImageError(
            path,
            f"was written by another version of qchain (format {said}, not {FORMAT})",
            "finish with 'qchain recover' of that version",
        )
    return stored


def _believed(path: Path) -> bytes:
    """The content of a file that only the caller or root can have written.

    Raises: `Refused` for any other.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused(
                path, "is a symbolic link, and no journal is", "look who put it there"
            ) from None
        reason = (error.strerror or str(error)).lower()
        raise ImageError(path, f"cannot be read: {reason}", "run as its owner") from None
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Refused(path, "is no regular file", "look who put it there")
        require_ours(path, status)
        if status.st_size > _LIMIT:
            raise ImageError(path, f"is longer than {_LIMIT} bytes", _BROKEN)
        return file.read(_LIMIT)


# --- field by field ----------------------------------------------------------------


def _journal(path: Path, stored: dict[str, Any]) -> Journal:
    chain = [layer_of(each) for each in listed(stored["layers"])]
    if not chain:
        raise ValueError("it names no layers")
    actives = tuple(index(each, len(chain)) for each in listed(stored["actives"]))
    if not actives:
        raise ValueError("it names no active image")
    groups = tuple(_group(chain, each) for each in listed(stored["groups"]))
    group = index(stored["group"], len(groups))
    return Journal(
        path,
        actives,
        one_of(stored["verify"], VERIFY),
        chain,
        groups,
        names=one_of(stored["names"], NAMES),
        allow_format_change=bool(stored["allow_format_change"]),
        scan=tuple(path_of(each) for each in listed(stored["scan"])),
        group=group,
        step=index(stored["step"], len(groups[group].steps)),
        token=text(stored["token"]),
        home_inode=number(stored["home"]),
        unsettled={index(each, len(chain)) for each in listed(stored["unsettled"])},
        carrying=bool(stored["carrying"]),
        altered=bool(stored["altered"]),
    )


def layer_of(stored: Any) -> LayerRecord:
    """A stored file. Raises `ValueError`, `KeyError`, `TypeError` for anything else."""
    return LayerRecord(
        path_of(stored["path"]),
        one_of(stored["format"], ("qcow2", "raw")),
        FileId(number(stored["device"], -1), number(stored["inode"])),
        FileState(number(stored["size"]), number(stored["mtime_ns"], None), text(stored["digest"])),
    )


def _group(chain: list[LayerRecord], stored: Any) -> GroupRecord:
    line = tuple(index(each, len(chain)) for each in listed(stored["line"]))
    onto = tuple(index(each, len(chain)) for each in listed(stored.get("onto", [])))
    if len(set(line)) != len(line) or len(line) + len(onto) < 2 or len(set(onto)) != len(onto):
        raise ValueError("a group that is no chain")
    count = index(stored["count"], len(line) + 1)
    own = index(stored["own"], count + 1)
    if count < (1 if onto else 2) or own < 1:
        raise ValueError("a group without dropped images")
    present, copy = stored["present"], stored["copy"]
    if copy is not None and index(copy, len(chain)) in line:
        raise ValueError("a copy that is in the chain")
    if present is not None:
        name, fmt = listed(present)
        present = (text(name), None if fmt is None else text(fmt))
    steps = tuple(step_from_json(step) for step in listed(stored["steps"]))
    target = index(stored["target"], own)
    return GroupRecord(chain, line, count, own, target, present, steps, copy, onto)
