"""The journal of a merge: what it does, how far it is, and how it left every file.

One JSON document beside the active image, `.qchain-TOKEN.journal`, replaced as a whole
and durably before each step. Format 3:

    {"qchain_journal": 3, "token", "actives": [index], "home": inode,
     "verify", "names", "allow_format_change": bool, "scan": [path],
     "layers": [{"path", "format", "device", "inode", "size", "mtime_ns", "digest"}],
     "groups": [{"line": [index], "count": c, "own": o, "target": t,
                 "copy": index | null, "present": [name, format] | null, "steps": [..],
                 "onto": [index]}],
     "group": g, "step": s, "unsettled": [index], "carrying": bool,
     "altered": bool}

`layers`: all files of the tree. A group's line: from its kept image down to the base; its
first c are merged, its first o are its own (the others are only read, and stay), and its
target is among them, at place t of the line. Of a copy `layers` has the new file, known only
when it is whole; inode 0 until then, and for what a finished group has deleted. `onto`: the
chain that a rebase leads the kept image to, empty for a merge. `home`: the inode of the
journal's directory. `present`: the target's backing name before.
Step s of group g may have been done in part, those before it are done. Each layer is
described as it was when it was last durable and ours; those in `unsettled` were being
written to. `carrying`: what a guest wrote to the kept
image after a stop is being taken over into the target. `altered`: a commit has written to
the target, and then the group was put back to its first step.

Where images lie in further directories, each of these has a pointer of the same name:

    {"qchain_journal": 3, "see": path of the journal}

Without a journal nothing is unfinished. How one is read, and which ones are believed:
`qchain.run.journal_file`. Formats 1 and 2 (before the first release) knew no trees.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from qchain.chain.layer import Layer
from qchain.chain.scan import JOURNAL_SUFFIX, WORK_PREFIX, identity
from qchain.hostfile import FileId, HostFile
from qchain.plan.plan import Plan
from qchain.plan.steps import Adopt, Step
from qchain.plan.stored import step_to_json
from qchain.run.durable import fsync_file, unlink_durably, write_durably
from qchain.run.identity import FileState, state_of

__all__ = ["FORMAT", "GroupRecord", "Journal", "LayerRecord", "layer_json", "record_of"]

FORMAT = 3


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A file of the chain, and how it was when it was last durable and ours."""

    path: Path
    format: str
    id: FileId
    state: FileState


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """One group: see the format. `chain`: all files of the journal."""

    chain: list[LayerRecord]
    line: tuple[int, ...]
    count: int
    own: int
    target: int
    present: tuple[str, str | None] | None
    steps: tuple[Step, ...]
    copy: int | None = None
    onto: tuple[int, ...] = ()

    @property
    def goal(self) -> LayerRecord:
        """The file that becomes the result."""
        return self.chain[self.line[self.target] if self.copy is None else self.copy]

    @property
    def layers(self) -> list[LayerRecord]:
        """The kept image and all below it, down to the base; then those of `onto`."""
        return [self.chain[index] for index in (*self.line, *self.onto)]

    @property
    def below(self) -> int | None:
        """The place of the new backing in `layers`; None where there is none."""
        if self.onto:
            return len(self.line)
        return self.count if self.count < len(self.line) else None

    @property
    def members(self) -> list[LayerRecord]:
        """The kept image and the dropped ones that are the group's own."""
        return [self.chain[index] for index in self.line[: self.own]]


@dataclass
class Journal:
    """A merge under way. `write` before a step, `settle` after a flush, `remove` at the end."""

    path: Path
    actives: tuple[int, ...]
    verify: str
    chain: list[LayerRecord]
    groups: tuple[GroupRecord, ...]
    names: str = "kept"
    allow_format_change: bool = False
    scan: tuple[Path, ...] = ()
    group: int = 0
    step: int = 0
    token: str = ""
    home_inode: int = 0
    unsettled: set[int] = field(default_factory=set)
    carrying: bool = False
    altered: bool = False
    _groups_json: list[dict[str, object]] = field(default_factory=list, repr=False)
    _written: bool = field(default=False, repr=False)

    @classmethod
    def begin(cls, plan: Plan) -> Journal:
        """The journal of a plan, not written yet; the files of the groups are flushed.

        Without the flush a power loss could take back the very times by which they are
        known.
        """
        active = plan.layers[plan.tree.actives[0]].path.absolute()
        for group in plan.groups:
            for index in group.group.owned:
                fsync_file(plan.layers[index].path)
        chain = [record_of(layer) for layer in plan.layers]
        groups = []
        for group in plan.groups:
            assert group.chosen is not None
            target, copy = group.chosen.target, None
            if target is None:
                (new,) = (step.image for step in group.steps if isinstance(step, Adopt))
                copy = len(chain)
                chain.append(_unknown(new, plan.layers[group.group.kept].format))
            backing = None if target is None else plan.layers[target].backing
            groups.append(
                GroupRecord(
                    chain,
                    group.group.line,
                    group.group.count,
                    group.group.own,
                    0 if target is None else group.group.line.index(target),
                    None if backing is None else (backing.name, backing.format),
                    group.steps,
                    copy,
                    group.group.onto,
                )
            )
        return cls(
            active.parent / f"{WORK_PREFIX}{plan.token}{JOURNAL_SUFFIX}",
            plan.tree.actives,
            plan.options.verify,
            chain,
            tuple(groups),
            names=plan.options.names,
            allow_format_change=plan.options.allow_format_change,
            scan=tuple(path.absolute() for path in plan.options.scan),
            token=plan.token,
            home_inode=active.parent.stat().st_ino,
        )

    @property
    def begun(self) -> bool:
        """Whether it was ever written: before that nothing is changed."""
        return self._written

    @property
    def active(self) -> Path:
        """The first active image, beside which the journal lies."""
        return self.chain[self.actives[0]].path

    def write(self, group: int, step: int, writing: Iterable[Path] = ()) -> None:
        """Durably: step `step` of group `group` is about to be done, and writes to `writing`."""
        if group != self.group:
            self.forget_deleted()
        self.group, self.step = group, step
        self.unsettled |= self.indices(writing)
        document = {
            **self._head(),
            "group": group,
            "step": step,
            "unsettled": sorted(self.unsettled),
            "carrying": self.carrying,
            "altered": self.altered,
        }
        write_durably(self.path, _encoded(document))
        if not self._written:
            for pointer in self.pointers():
                write_durably(pointer, _encoded({"qchain_journal": FORMAT, "see": str(self.path)}))
            self._written = True

    def settle(self) -> None:
        """What was being written to is finished: flush it and note how it is now."""
        for index in sorted(self.unsettled):
            record = self.chain[index]
            for path in self._names():
                if _id(path) == record.id:
                    fsync_file(path)
                    with HostFile(path) as file:
                        self.chain[index] = replace(record, state=state_of(file))
                    break
        self.unsettled.clear()

    def adopt(self, index: int, layer: Layer | None) -> None:
        """A new file is whole: know it by what it is. None: it is to be made again."""
        known = self.chain[index]
        self.chain[index] = (
            _unknown(known.path, known.format) if layer is None else record_of(layer)
        )

    def forget_deleted(self) -> None:
        """A group is finished: of what it deleted the numbers may be those of new files soon."""
        # What only stays, and is read, may be known by a link.
        there = {identity(path) for path in self._names()}
        for index, record in enumerate(self.chain):
            if record.id not in there:
                self.chain[index] = _unknown(record.path, record.format)

    def remove(self) -> None:
        """Nothing is left to do. The pointers first: none may lead nowhere."""
        for pointer in self.pointers():
            if pointer.parent.is_dir():
                unlink_durably(pointer.with_name(f"{pointer.name}.new"))
                unlink_durably(pointer)
        unlink_durably(self.path)

    def pointers(self) -> list[Path]:
        """Where a pointer to this journal belongs: beside the images in other directories."""
        here = os.path.realpath(self.path.parent)
        places = {
            os.path.realpath(member.path.parent)
            for group in self.groups
            for member in group.members
        }
        return sorted(Path(place, self.path.name) for place in places - {here})

    def indices(self, paths: Iterable[Path]) -> set[int]:
        """Which layers the files of these names are, whatever names they were planned under."""
        ids = {_id(path) for path in paths}
        return {index for index, record in enumerate(self.chain) if record.id in ids}

    def _names(self) -> list[Path]:
        return [record.path for record in self.chain]

    def _head(self) -> dict[str, object]:
        if not self._groups_json:
            self._groups_json = [_group_json(record) for record in self.groups]
        return {
            "qchain_journal": FORMAT,
            "token": self.token,
            "actives": self.actives,
            "home": self.home_inode,
            "verify": self.verify,
            "names": self.names,
            "allow_format_change": self.allow_format_change,
            "scan": [str(path) for path in self.scan],
            "layers": [layer_json(record) for record in self.chain],
            "groups": self._groups_json,
        }


def _unknown(path: Path, fmt: str) -> LayerRecord:
    return LayerRecord(path, fmt, FileId(0, 0), FileState(0, 0, ""))


def record_of(layer: Layer) -> LayerRecord:
    """A file of the chain as it is now, under its name as the steps have it."""
    return LayerRecord(layer.path.absolute(), layer.format, layer.file.id, state_of(layer.file))


def _id(path: Path) -> FileId | None:
    """The file that a name is; links are not followed, unless they lead to a block device."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    if stat.S_ISREG(status.st_mode):
        return FileId(status.st_dev, status.st_ino)
    found = identity(path)
    return found if found is not None and found.device == -1 else None


def _encoded(document: dict[str, object]) -> bytes:
    return json.dumps(document, indent=1, ensure_ascii=True).encode("ascii")


def layer_json(record: LayerRecord) -> dict[str, object]:
    """As it is stored; `qchain.run.journal_file.layer_of` reads it again."""
    return {
        "path": str(record.path),
        "format": record.format,
        "device": record.id.device,
        "inode": record.id.inode,
        "size": record.state.size,
        "mtime_ns": record.state.mtime_ns,
        "digest": record.state.digest,
    }


def _group_json(record: GroupRecord) -> dict[str, object]:
    return {
        "line": record.line,
        "count": record.count,
        "own": record.own,
        "target": record.target,
        "copy": record.copy,
        "present": record.present,
        "steps": [step_to_json(step) for step in record.steps],
        "onto": record.onto,
    }
