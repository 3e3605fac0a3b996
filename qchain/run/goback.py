"""Going on after a stop, and going back: what a step left behind, and how it is undone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qchain.chain.scan import WORK_PREFIX, identity
from qchain.errors import FailedMidway, QchainError
from qchain.hostfile import HostFile
from qchain.plan.commands import rebase_unsafe_argv, resize_shrink_argv, unlocked_argv
from qchain.plan.steps import (
    Command,
    Freeze,
    HardLink,
    MakeDirectory,
    NativeCopy,
    NativeSwitch,
    NativeWrite,
    Rename,
    Step,
    SymbolicLink,
    TakeManifest,
    Unlink,
)
from qchain.qcow2.header import read_header
from qchain.run.bitmaps import give_back
from qchain.run.confirm import confirm
from qchain.run.cut_short import cut_again
from qchain.run.identity import state_of
from qchain.run.oldview import rescued_beside
from qchain.run.pending import pending_files

if TYPE_CHECKING:
    from qchain.run.group import GroupRun

__all__ = [
    "altered",
    "created",
    "led_away",
    "put_back",
    "require_old_chain",
    "restore_backing",
    "resume",
    "resume_at",
]


def resume(run: GroupRun, step: int) -> None:
    """Be as one who has done the steps before `step`."""
    run.resumed = True
    for index in range(step):
        resume_at(run, index, done=True)


def resume_at(run: GroupRun, index: int, *, done: bool = False) -> None:
    """Note what step `index` leaves behind; unless `done` it may not have been reached."""
    step = run.record.steps[index]
    switches = isinstance(step, Rename)
    if isinstance(step, Unlink):
        switches = step.path in run.names and (done or not os.path.lexists(step.path))
    elif isinstance(step, Command):
        switches = run.repoints_above(step)
    elif isinstance(step, Rename) and not done:
        # Whether it was reached shows in the names.
        switches = not os.path.lexists(step.old)
    run.switched = run.switched or switches
    match step:
        case MakeDirectory(path):
            run.made.append(path)
        case Freeze(_, into):
            run.made += [into, rescued_beside(into)]
            if done and into.exists() and run.old.layers:
                run.old.look_back(into)
        case TakeManifest(_, into):
            run.made.append(into)
        case HardLink(existing, link):
            run.note_link(existing, link)
        case SymbolicLink(_, link):
            run.note(link)
        case Command(argv) if argv[0] == "create":
            run.made.append(created(step))
        case Command(argv) if argv[0] == "convert":
            run.made.append(run.t_path)
        case NativeCopy(image):
            run.made.append(image)
        case NativeWrite(_, into):
            run.made += pending_files(into)
        case _:
            pass


def require_old_chain(run: GroupRun) -> None:
    """Raise `FailedMidway` unless there is all that the target is to read through again.

    Its header may name the new backing file by now, and then it needs nothing of the old.
    """
    record = run.record
    if record.present is None:
        return
    for place in range(record.target + 1, max(record.count, record.target + 2)):
        known = record.layers[place]
        found = identity(known.path)
        # Below the group an earlier one may have given the name to its result.
        if found is None or (place < record.count and found != known.id):
            why = "is missing" if found is None else "is another file"
            raise FailedMidway(known.path, f"{why}, and {run.t_path.name} would back on it again")


def restore_backing(run: GroupRun) -> None:
    """Let the target's header name its old backing file again; its content is the same."""
    require_old_chain(run)
    name, fmt = run.record.present or (None, None)
    argv = rebase_unsafe_argv(run.t_path, "qcow2", name, fmt)
    if run.journal is not None:
        run.journal.write(run.journal.group, run.journal.step, (run.t_path,))
    with run.locks.handed_over((run.t_path,), (), run.t_path) as held:
        run.qemu.run(unlocked_argv(argv) if held else argv, pass_fds=held)
    run.flush(run.t_path)
    below = None if name is None else run.record.layers[run.record.target + 1].path
    confirm(run.t_path, below, fmt, None, run.switched)
    run.steady.note(run.locks.layers, {run.record.goal.id})


def led_away(run: GroupRun) -> bool:
    """Whether the target's header names another backing file than before the merge."""
    present, raw = run.record.present, run.record.layers[run.record.target].format == "raw"
    if raw or (present is None and not run.record.onto):
        return False
    with HostFile(run.t_path) as file:
        name = read_header(file).backing_name
        if file.id == run.record.layers[run.record.target].id:
            return name != (None if present is None else present[0])
    if name is not None and WORK_PREFIX in name:
        raise FailedMidway(run.t_path, "is another file, and backs on a work file")
    if any(path.name.endswith(".b") and os.path.lexists(path) for path in run.made):
        # The image that was pulled into has another name now, and may name an alias.
        raise FailedMidway(run.t_path, "is another file than the one pulled into")
    return False  # another file: not ours to change


def put_back(run: GroupRun) -> bool:
    """Undo what was not switched, remove work files; whether that succeeded. Never raises."""
    if run.switched:
        return False
    try:
        if led_away(run):
            restore_backing(run)
        if any(isinstance(step, NativeWrite) for step in run.record.steps):
            # Imported late: qemu-img is the usual engine.
            from qchain.run.native import give_up_written

            give_up_written(run)
        _end_cut(run)
        give_back(run, run.journal is not None and bool(altered(run, run.journal.step)))
    except (QchainError, OSError):
        return False  # the aliases must stay: the header may still name them
    with contextlib.suppress(QchainError, OSError):
        _from_the_start(run)
    for existing, link in run.links:
        with contextlib.suppress(OSError):
            if link.samefile(existing):
                link.unlink()
    # Also of what was made before a stop in the midst of this: the journal knows nothing of that
    # any more.
    work = list(dict.fromkeys([*run.made, *_work_files(run)]))
    for path in reversed(work):
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
    return not any(os.path.lexists(path) for path in work)


def _end_cut(run: GroupRun) -> None:
    """A target whose cutting was stopped is not consistent: it is cut to the end.

    What it showed beyond was no kept point, and the commit had changed it before.
    """
    journal, steps = run.journal, run.record.steps
    if journal is None or run.record.goal.format != "qcow2":
        return
    for index in (journal.step - 1, journal.step):
        # One that was not flushed may be undone in part by a loss of power.
        step = steps[index] if index >= 0 else None
        if isinstance(step, Command) and step.argv[0] == "resize":
            size = int(step.argv[-1])
            journal.write(journal.group, journal.step, (run.t_path,))
            run.resize(resize_shrink_argv(run.t_path, "qcow2", size))
            cut_again(run.t_path, size, run.resize)
            run.flush(run.t_path)
            run.steady.note(run.locks.layers, {run.record.goal.id})


def _work_files(run: GroupRun) -> Iterator[Path]:
    """All that the steps make beside the images, in order; it is nobody else's."""
    directories = set()
    for step in run.record.steps:
        match step:
            case MakeDirectory(path):
                directories.add(path)
                yield path
            case Freeze(_, into):
                yield from (into, rescued_beside(into))
            case TakeManifest(_, into):
                yield into
            case NativeWrite(_, into):
                yield from pending_files(into)
            case NativeCopy(image):
                yield image
            case HardLink(_, link) | SymbolicLink(_, link) if link.parent in directories:
                yield link
            case Command(argv) if argv[0] == "create":
                yield created(step)
            case Command(argv) if argv[0] == "convert":
                yield run.t_path
            case _:
                pass


def _from_the_start(run: GroupRun) -> None:
    """Whoever goes on from here has no work files any more: the first step is the next."""
    if run.journal is not None:
        run.journal.altered = bool(altered(run, run.journal.step))
        run.journal.carrying = False
        # Not settled: after ^C nobody waits until gigabytes are flushed. No kept point needs
        # them, and the first step makes anew all that it looks at.
        run.journal.write(run.journal.group, 0)


def altered(run: GroupRun, index: int) -> list[Path]:
    """The dropped points that read otherwise than before, if the merge ends at step `index`.

    A commit writes to the target: what shows through it, and is no kept point, changes.
    """
    steps = run.record.steps
    commit = next((n for n, step in enumerate(steps) if _overwrites(run, step)), None)
    before = run.journal is not None and run.journal.altered
    if commit is None or (index < commit and not before):
        return []
    known = run.record.layers[run.record.target]
    if index <= commit + 1 and not before:
        # It may not have come to the first write: then the file is as it was noted.
        with contextlib.suppress(QchainError, OSError), HostFile(run.t_path) as file:
            if file.id == known.id and state_of(file) == known.state:
                return []
    return [record.path for record in run.record.layers[1 : run.record.target + 1]]


def _overwrites(run: GroupRun, step: Step) -> bool:
    """Whether from this step on the target, not being the kept image, reads otherwise."""
    if isinstance(step, NativeSwitch):
        return run.record.target > 0
    return isinstance(step, Command) and step.commits


def created(step: Command) -> Path:
    """The image that a `create` makes: its last argument but the size, or the last."""
    name = Path(step.argv[-2])
    return name if step.cwd is None else step.cwd / name
