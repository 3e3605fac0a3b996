"""A plan in a file, to be done later: what makes it again, and which files it was made for.

The plan's own JSON, and beside it

    {"qchain_plan": 1, "version": of qchain, "program": "qemu-img",
     "request": {"actives": [index], "drop": [path], "keep": [path], "flatten", "collapse"},
     "options": {the fields of `MergeOptions`},
     "files": [{"path", "format", "device", "inode", "size", "mtime_ns", "digest"}]}

`files`: all of the tree, each as a journal describes it. The file is not trusted: no step
is ever taken from it. The plan is made again from request and options, the images being
opened through the caller's gate; it is done only if every file is the one that the plan was
made for, and if the plan comes out the same. It must belong to the caller or to root, and
nobody else may be able to write to it: with `--yes` nobody looks at it again.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qchain.chain.chain_tree import ChainTree
from qchain.chain.layer import Layer
from qchain.chain.scan import WORK_PREFIX
from qchain.errors import ImageError, QchainError, Refused
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan
from qchain.plan.selection import Request, find_layers
from qchain.run.fields import flag, index, listed, path_of, text
from qchain.run.journal import LayerRecord, layer_json, record_of
from qchain.run.journal_file import layer_of
from qchain.run.private import require_ours

__all__ = ["Saved", "read_saved", "saved_document"]

FORMAT = 1
_LIMIT = 64 << 20  # bytes
_AGAIN = "plan again"
_SHOWN = 200  # characters of a text from the file in a message


def saved_document(plan: Plan, program: str = "qemu-img") -> dict[str, object]:
    """What is to be saved of a plan. `program`: the name of qemu-img in its commands."""
    request = {
        "actives": list(plan.tree.actives),
        # A name counts from where the command was given: here all are whole.
        "drop": _whole(plan.request.drop, plan.layers),
        "keep": _whole(plan.request.keep, plan.layers),
        "flatten": plan.request.flatten,
        "collapse": plan.request.collapse,
    }
    options = {each.name: _stored(plan.options, each.name) for each in fields(plan.options)}
    return {
        "qchain_plan": FORMAT,
        "version": version("qchain"),
        "program": program,
        **plan.as_json(program),
        "request": request,
        "options": options,
        "files": [layer_json(_as_planned(layer)) for layer in plan.layers],
    }


def _whole(names: Sequence[str], layers: Sequence[Layer]) -> list[str]:
    return [str(layers[number].path.absolute()) for number in find_layers(names, layers)]


def _stored(options: MergeOptions, name: str) -> object:
    value = getattr(options, name)
    if isinstance(value, tuple):
        return [str(path.absolute()) for path in value]
    return str(value.absolute()) if isinstance(value, Path) else value


def _as_planned(layer: Layer) -> LayerRecord:
    """How the file was when it was opened: what came after that the plan does not know."""
    record, file = record_of(layer), layer.file
    if file.is_block_device:
        return record
    state = replace(record.state, size=file.size, mtime_ns=file.mtime_ns)
    return replace(record, state=state)


@dataclass(frozen=True, slots=True)
class Saved:
    """A saved plan, read and found to be one; nothing of it has been believed yet."""

    path: Path
    version: str
    program: str
    actives: tuple[Path, ...]
    request: Request
    options: MergeOptions
    files: tuple[LayerRecord, ...]
    refusals: tuple[str, ...]
    outcome: object
    """What the plan came to, as JSON: groups and steps."""

    def require_possible(self) -> None:
        """Raise `Refused` for a plan that was refused when it was made, or cannot be made again."""
        if self.refusals:
            why = f"it was refused when it was made: {self.refusals[0][:_SHOWN]}"
            raise Refused(self.path, why, f"mend this and {_AGAIN}")
        for directory in self.options.scan:
            if not directory.is_dir():
                raise Refused(directory, "was to be scanned, and is no directory", _AGAIN)

    def require_same_files(self, tree: ChainTree) -> None:
        """Raise `Refused` unless the open files are those that the plan was made for, unchanged."""
        known = {record.path: record for record in self.files}
        for layer in tree.layers:
            found = record_of(layer)
            before = known.pop(found.path, None)
            if before is None:
                raise Refused(found.path, f"is not in the plan {self.path}", _AGAIN)
            if (found.id, found.format) != (before.id, before.format):
                why = f"is another file than when {self.path} was made"
                raise Refused(found.path, why, _AGAIN)
            if found.state != before.state:
                raise Refused(found.path, f"has changed since {self.path} was made", _AGAIN)
        for path in known:
            raise Refused(path, f"is in the plan {self.path}, but not in the chain", _AGAIN)

    def require_same_plan(self, plan: Plan) -> None:
        """Raise `Refused` unless the plan, made again, comes to what was saved."""
        if plan.refusals:
            return  # they say it better
        made = _outcome(plan.as_json(self.program))
        if made != self.outcome:
            here = version("qchain")
            other = f" by qchain {self.version[:20]}" if self.version != here else ""
            raise Refused(
                self.path,
                f"says otherwise than what is to be done now: it was edited, or made{other} "
                "under other circumstances",
                _AGAIN,
            )


def read_saved(path: Path) -> Saved:
    """The plan saved in the file `path`.

    Raises: `ImageError` when it is none, or of another format.
    """
    try:
        stored = json.loads(_content(path).decode())
    except UnicodeError:
        raise _none(path, ": it is no text") from None
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise _none(path, f": {why}") from None
    if not isinstance(stored, dict) or not {"groups", "steps"} <= stored.keys():
        raise _none(path)
    if "qchain_plan" not in stored:
        raise _none(path, ": it says no format")
    if stored["qchain_plan"] != FORMAT or isinstance(stored["qchain_plan"], bool):
        said = str(stored["qchain_plan"])[:20]
        raise ImageError(
            path,
            f"was written by another version of qchain (format {said}, not {FORMAT})",
            f"{_AGAIN} with this one",
        )
    try:
        return _saved(path, stored)
    except QchainError as error:
        raise _none(path, f": {error.what}: {error.why}") from None
    except (ValueError, KeyError, TypeError) as error:
        what = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise _none(path, f": {what[:_SHOWN]}") from None


def _none(path: Path, why: str = "") -> ImageError:
    todo = "name a file that 'qchain plan -o' has written"
    return ImageError(path, f"is not a plan of qchain{why}", todo)


def _content(path: Path) -> bytes:
    """Bounded, and never waiting for what is no file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise ImageError(path, f"cannot be read: {why}", "check the name") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _none(path, ": it is no regular file")
        require_ours(path, status)
        if status.st_size > _LIMIT:
            raise _none(path, f": it is longer than {_LIMIT} bytes")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(_LIMIT)
    finally:
        os.close(fd)


def _saved(path: Path, stored: dict[str, Any]) -> Saved:
    files = tuple(layer_of(each) for each in listed(stored["files"]))
    request = stored["request"]
    actives = [files[index(each, len(files))].path for each in listed(request["actives"])]
    if not actives:
        raise ValueError("it names no active image")
    return Saved(
        path,
        text(stored["version"]),
        text(stored["program"]),
        tuple(actives),
        Request(
            tuple(str(path_of(each)) for each in listed(request["drop"])),
            tuple(str(path_of(each)) for each in listed(request["keep"])),
            flag(request["flatten"]),
            flag(request["collapse"]),
        ),
        _options(stored["options"]),
        files,
        tuple(text(each) for each in listed(stored["refusals"])),
        _outcome(stored),
    )


def _options(stored: Any) -> MergeOptions:
    if not isinstance(stored, dict):
        raise ValueError("it has no options")
    known = {each.name: each.default for each in fields(MergeOptions)}
    if stored.keys() != known.keys():
        raise ValueError("its options are not those of this version")
    return MergeOptions(**{name: _option(value, known[name]) for name, value in stored.items()})


def _option(value: Any, default: Any) -> Any:
    """A value of the kind that the option's default is of."""
    if isinstance(default, bool):
        return flag(value)
    if isinstance(default, tuple):
        return tuple(path_of(each) for each in listed(value))
    if isinstance(default, str):
        return text(value)
    return None if value is None else path_of(value)


_FIGURES = frozenset({"candidates", "why"})
"""Of a group: what led to the choice, which is not what is done."""
_TOKEN = re.compile(re.escape(WORK_PREFIX) + "[0-9a-f]{16}")


def _outcome(document: dict[str, Any]) -> object:
    """Of a plan as JSON what is done, its random names replaced by numbers."""
    groups = [
        {name: value for name, value in group.items() if name not in _FIGURES}
        for group in document["groups"]
        if isinstance(group, dict)
    ]
    done = json.dumps([document["active"], groups, document["steps"]], sort_keys=True)
    numbers: dict[str, str] = {}

    def numbered(found: re.Match[str]) -> str:
        return numbers.setdefault(found[0], f"{WORK_PREFIX}{len(numbers)}")

    return _TOKEN.sub(numbered, done)
