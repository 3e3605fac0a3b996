"""Finish a merge that was stopped, or undo what it had not switched yet.

Both may be stopped and repeated. Forward: the step that the journal names is done
again, and all after it. Back: the target's header names its old backing file again,
and the work files go; the chain is as long as before and reads as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qchain.chain.chain import open_layer
from qchain.chain.gate import Gate
from qchain.chain.layer import Layer
from qchain.errors import FailedMidway, ImageError, Refused
from qchain.hostfile import FileId, HostFile
from qchain.plan.steps import Command, Compare, Confirm, Freeze
from qchain.run.execute import Silent, run_group
from qchain.run.group import GroupRun, Observer
from qchain.run.journal import GroupRecord, Journal, find_journals, read_journal
from qchain.run.locking import ChainLocks, sole
from qchain.run.qemu_img import QemuImg

__all__ = ["Recovered", "journals_at", "recover"]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of one unfinished merge: "finished" or "put back"."""

    journal: Path
    active: Path
    outcome: str


def journals_at(where: Path) -> list[Path]:
    """The journals that concern `where`: all of a directory, or those that name an image.

    Raises: `ImageError` for a name that leads nowhere and that no journal knows.
    """
    if where.is_dir():
        return find_journals([where])
    name = where.absolute()
    found = [path for path in find_journals([name.parent]) if _concerns(read_journal(path), name)]
    if not found and not where.exists():
        raise ImageError(where, "no such file, and no journal names it", "name its directory")
    return found


def _concerns(journal: Journal, name: Path) -> bool:
    names = {record.path for group in journal.groups for record in group.layers}
    return name == journal.active or name in names


def recover(
    where: Iterable[Path],
    *,
    back: bool = False,
    qemu: QemuImg | None = None,
    observer: Observer | None = None,
) -> list[Recovered]:
    """Finish (or with `back` undo) the merges whose journals are given.

    Raises: `Refused` when an image is in use, has changed since, or when `back` comes too
        late; `FailedMidway` when a step fails again. Repeating is always safe.
    """
    out = []
    for path in where:
        with contextlib.suppress(OSError):
            path.with_name(f"{path.name}.new").unlink()
        journal = read_journal(path)
        with sole(journal.active):
            outcome = _one(journal, back, qemu or QemuImg(), observer or Silent())
        out.append(Recovered(path, journal.active, outcome))
    return out


def _one(journal: Journal, back: bool, qemu: QemuImg, observer: Observer) -> str:
    for number in range(journal.group, len(journal.groups)):
        record = journal.groups[number]
        first = _where_to_begin(record, journal.step) if number == journal.group else 0
        layers = _open(record, first)
        try:
            with ChainLocks(layers, layers[: record.below]) as locks:
                run = GroupRun(record, layers, journal.verify, qemu, observer, locks)
                run.resume(first)
                if back:
                    return _back(run, journal, first)
                run_group(run, journal, number, first)
        finally:
            for layer in layers:
                layer.data.close()
                layer.file.close()
    journal.remove()
    return "finished"


def _where_to_begin(record: GroupRecord, step: int) -> int:
    """The step to repeat: for a look at a header, the command that was to write it."""
    if isinstance(record.steps[step], Confirm):
        while not isinstance(record.steps[step], Command):
            step -= 1
    return step


def _back(run: GroupRun, journal: Journal, first: int) -> str:
    """Undo the group under way; what it had begun at `first` may have been done or not."""
    if not run.switched:
        run.resume_at(first)
    if run.switched:
        raise Refused(
            journal.active,
            "the merge has already switched to its result; it can only go forward",
            "run 'qchain recover' without --back",
        )
    if not run.put_back():
        raise FailedMidway(journal.active, "could not be put back as it was")
    journal.remove()
    return "put back"


def _needs_layers(record: GroupRecord, first: int) -> bool:
    """Whether a step from `first` on looks into the images (the others know all they need)."""
    return any(
        isinstance(step, (Freeze, Compare))
        or (isinstance(step, Command) and "-u" not in step.argv and step.argv[0] != "create")
        for step in record.steps[first:]
    )


def _open(record: GroupRecord, first: int) -> list[Layer]:
    """The layers of the group as they were; none where only names are left to change."""
    if not _needs_layers(record, first):
        return []
    layers: list[Layer] = []
    gate = Gate(follow=True)
    try:
        for known in record.layers:
            file = HostFile(known.path)
            layers.append(open_layer(known.path, file, known.format, gate, known.path))
            if file.id != FileId(known.device, known.inode):
                raise Refused(
                    known.path,
                    "is another file than the one the merge began with",
                    "put the right file back under this name",
                )
    except BaseException:
        for layer in layers:
            layer.file.close()
        raise
    return layers
