"""Carry out a plan, step by step, and prove the result before anything is deleted.

When a step fails before the switch, the group is put back: the header of the
target names its old backing again, work files go, and every point reads as before.
When the process is killed, the journal lets `qchain.run.recover` go on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qchain.chain.chain import Chain
from qchain.chain.chain_tree import ChainTree, tree_of
from qchain.chain.layer import Layer, close_layers
from qchain.errors import Damaged, FailedMidway, QchainError, Refused
from qchain.plan.plan import Plan
from qchain.plan.refusals import overlay_refusals, unfinished_refusals
from qchain.plan.steps import (
    Command,
    NativeSwitch,
    Rename,
    Step,
    Sync,
    Unlink,
    written_by,
)
from qchain.run.goback import altered as altered_points
from qchain.run.goback import put_back
from qchain.run.group import GroupRun, Observer
from qchain.run.journal import Journal
from qchain.run.locking import ChainLocks, sole
from qchain.run.qemu_img import QemuImg
from qchain.run.room import shortage_told
from qchain.run.survey import refuse_overlays
from qchain.run.whole import Whole, weight_of

__all__ = ["MergeResult", "Observer", "Silent", "execute", "named", "run_group"]


def named(paths: Sequence[Path]) -> str:
    """The file names, for a sentence; of many the first."""
    names = [path.name for path in paths[:4]]
    if len(paths) > 4:
        names.append(f"{len(paths) - 4} more")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


class Silent:
    """An observer that does not look."""

    def step(self, label: str, total: int, done: int = 0) -> None: ...

    def advance(self, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was verified (None: nothing was, as asked) and how long it all took."""

    mode: str
    compared_bytes: int
    identical: bool
    seconds: float


def run_group(
    run: GroupRun,
    journal: Journal,
    number: int,
    first: int = 0,
    before_step: Callable[[Step], None] | None = None,
) -> None:
    """Do the steps of a group from `first` on, each announced in the journal.

    Overlays are looked for once more before the result takes its place, and before the first
    image is deleted: a pull may take an hour.

    Raises: `FailedMidway`, `KeyboardInterrupt`; the group is put back then as far as it
        was not switched, and the journal stays only if something is left to recover.
    """
    steps = run.record.steps
    looked: set[type[Step]] = set()
    run.journal = journal
    index = first
    try:
        for index in range(first, len(steps)):
            step = steps[index]
            journal.write(number, index, written_by(step))
            if before_step is not None:
                before_step(step)
            if _commits_to(step, run) - looked:
                # Of all that this run has changed: what backs on it may have come meanwhile.
                refuse_overlays(journal, first)
                looked |= _commits_to(step, run)
            run.perform(step)
            if isinstance(step, Sync) and journal.unsettled:
                journal.settle()
    except (KeyboardInterrupt, OSError, QchainError) as error:
        altered = altered_points(run, index)
        # Before work files go and free what they took.
        why = _why(error, run)
        whole = put_back(run)
        if whole:
            journal.remove()
        if isinstance(error, KeyboardInterrupt):
            # What was written, if anything, shows through no image.
            as_before = "every point reads as before; merge again"
            way = _way_on(whole, altered, "merge again") if altered or not whole else as_before
            raise KeyboardInterrupt(way) from None
        if isinstance(error, Damaged):
            raise Damaged(error.what, why) from None
        way = _way_on(whole, altered, "mend this and merge again")
        if isinstance(error, OSError):
            what = str(error.filename or run.t_path)
            raise FailedMidway(what, why, way) from None
        raise FailedMidway(error.what, why, way) from None
    finally:
        run.close()


def _why(error: KeyboardInterrupt | OSError | QchainError, run: GroupRun) -> str:
    if isinstance(error, KeyboardInterrupt):
        return ""
    if isinstance(error, OSError):
        return shortage_told((error.strerror or str(error)).lower(), run.room)
    return shortage_told(error.why, run.room)


def _let_go(locks: ChainLocks) -> None:
    """Close what has no name any more: only then its space is free for the next group."""
    gone = [
        layer for layer in locks.layers if layer.file.fd < 0 or not os.fstat(layer.file.fd).st_nlink
    ]
    locks.layers = [layer for layer in locks.layers if layer not in gone]
    close_layers(gone)


def _commits_to(step: Step, run: GroupRun) -> set[type[Step]]:
    """The kind of a step after which there is no way back; empty for the others."""
    names = {known.path for known in run.record.layers}
    final = (
        isinstance(step, Rename)
        or (isinstance(step, Unlink) and step.path in names)
        or (isinstance(step, Command) and step.argv[:2] == ("rebase", "-u"))
        or isinstance(step, NativeSwitch)
    )
    return {type(step)} if final else set()


def _way_on(whole: bool, altered: Sequence[Path], todo: str) -> str:
    """What a stop leaves, and what to do: `whole` if the group was put back."""
    if not whole:
        return "every kept point is intact; 'qchain recover' continues"
    if not altered:
        return f"every kept point is intact; {todo}"
    return (
        "every kept point is intact, but the commit had begun: of the points to be dropped, "
        f"{named(altered)} no longer read as before; {todo}"
    )


def _unchanged(layers: Sequence[Layer]) -> None:
    """Raise `Refused` when a file is not as it was when the chain was opened.

    Between plan and merge a person may think for an hour, and a guest run.
    """
    for layer in layers:
        try:
            status = layer.path.stat()
        except OSError:
            status = None
        known = os.fstat(layer.file.fd)
        if (
            status is None
            or (status.st_dev, status.st_ino) != (known.st_dev, known.st_ino)
            or (status.st_mtime_ns, status.st_size) != (layer.file.mtime_ns, known.st_size)
            or (not layer.file.is_block_device and known.st_size != layer.file.size)
        ):
            raise Refused(layer.path, "has changed since it was planned", "plan again")


def execute(
    plan: Plan,
    chain: Chain | ChainTree,
    qemu: QemuImg | None = None,
    observer: Observer | None = None,
    before_step: Callable[[Step], None] | None = None,
) -> MergeResult:
    """Merge as `plan` says; `chain` is the chain, or tree, it was made from, still open.

    `before_step` is called before each step (tests stop there).

    Raises: `Refused` before anything was changed (the plan has refusals, an image is in
        use); `FailedMidway` when a step failed, every kept point being intact.
    """
    if plan.refusals:
        raise Refused("merge", plan.refusals[0], "")
    begun = time.monotonic()
    mode = plan.options.verify
    compared, verified = 0, True
    started: list[Journal] = []
    if plan.groups:
        whole = Whole(observer or Silent(), weight_of(plan.steps))
        try:
            compared, verified = _merge(
                plan, tree_of(chain), qemu or QemuImg(), whole, before_step, started
            )
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(*(error.args or (_how_it_stands(started),))) from None
    return MergeResult(mode, compared, verified and mode != "none", time.monotonic() - begun)


def _merge(
    plan: Plan,
    tree: ChainTree,
    qemu: QemuImg,
    observer: Observer,
    before_step: Callable[[Step], None] | None,
    started: list[Journal],
) -> tuple[int, bool]:
    """Merge all groups under the locks of all files; `started` gets the journal.

    Returns: bytes compared, and whether all was identical.
    """
    compared, verified = 0, True
    layers: Sequence[Layer] = tree.layers
    alone = {index for group in plan.groups for index in group.group.members}
    merged = [layers[index] for index in sorted(alone.union(tree.actives))]
    files = [layer.file for layer in layers]
    with (
        sole(files, [layer.file for layer in merged]),
        ChainLocks(layers, merged) as locks,
    ):
        _unchanged(layers)
        groups = [group.group for group in plan.groups]
        late = overlay_refusals(layers, groups, plan.options)
        for line in late + unfinished_refusals(layers, groups, plan.token):
            raise Refused("merge", line, "")
        journal = Journal.begin(plan)
        started.append(journal)
        for number, (group, record) in enumerate(zip(plan.groups, journal.groups, strict=True)):
            held = [layers[index] for index in (*group.group.line, *group.group.onto)]
            run = GroupRun(record, held, plan.options.verify, qemu, observer, locks)
            run_group(run, journal, number, 0, before_step)
            _let_go(locks)
            if run.old.comparison is not None:
                compared += run.old.comparison.compared_bytes
                verified = verified and run.old.comparison.identical
        journal.remove()
    return compared, verified


def _how_it_stands(started: Sequence[Journal]) -> str:
    """After ^C between the steps: what there is to be done."""
    if not any(journal.begun for journal in started):
        return "nothing was changed"
    if any(os.path.lexists(journal.path) for journal in started):
        return "every kept point is intact; 'qchain recover' continues"
    return "the merge is done"
