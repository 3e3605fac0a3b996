"""Finish a merge that was stopped, or undo what it had not switched yet.

Both may be stopped and repeated. Forward: the step that the journal names is done
again, and all after it. Back: the target's header names its old backing file again,
and the work files go; the chain is as long as before, and every kept point reads as
before. Dropped points that a commit has written to do not, and nothing brings them
back: going back then needs the word of the user.

A guest may have run meanwhile. What it wrote to the kept image is committed again and
compared again before the image is replaced.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from qchain.chain.chain import open_layer
from qchain.chain.gate import Gate
from qchain.chain.layer import Layer
from qchain.chain.scan import places_of
from qchain.errors import FailedMidway, ImageError, QchainError, Refused
from qchain.hostfile import FileId, HostFile
from qchain.plan.steps import (
    Command,
    Compare,
    Confirm,
    ConfirmBitmaps,
    NativeFree,
    NativeSwitch,
    NativeWrite,
    Rename,
    Step,
    SymbolicLink,
    Sync,
    TakeManifest,
    written_by,
)
from qchain.run.bitmaps import bitmap_command, follow_kept, place_again
from qchain.run.durable import discard_unwritten
from qchain.run.execute import Silent, named, run_group
from qchain.run.goback import altered as altered_points
from qchain.run.goback import led_away, put_back, require_old_chain, resume, resume_at
from qchain.run.group import GroupRun, Observer
from qchain.run.identity import state_of
from qchain.run.journal import GroupRecord, Journal
from qchain.run.journal_file import find_journals, read_journal, unwritten
from qchain.run.lawful import given_up
from qchain.run.locking import ChainLocks, sole
from qchain.run.qemu_img import QemuImg
from qchain.run.survey import (
    Files,
    examine,
    is_commit,
    is_pull,
    layers_of,
    moves_content,
    open_files,
    refuse_overlays,
    renumber,
)
from qchain.run.whole import Whole, weight_of
from qchain.verify.compare import compare

__all__ = ["Recovered", "journals_at", "recover"]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of one unfinished merge: "finished" or "put back".

    `altered`: dropped points that are there again but no longer read as before.
    """

    journal: Path
    active: Path
    outcome: str
    altered: tuple[Path, ...] = ()


def journals_at(where: Path) -> list[Path]:
    """The journals that concern `where`: all of a directory, or those that name an image.

    Also what is left of one that was killed while it was written for the first time.

    Raises: `ImageError` for a name that leads nowhere and that no journal knows, and for
        a broken journal; `Refused` for one that is not to be believed.
    """
    if where.is_dir():
        return find_journals([where]) + unwritten(where)
    name = where.absolute()
    places = sorted(places_of(name))
    found = [path for path in find_journals(places) if _concerns(path, name)]
    if not found and not where.exists():
        raise ImageError(where, "no such file, and no journal names it", "name its directory")
    return found + [path for place in places for path in unwritten(place)]


def _concerns(journal: Path, name: Path) -> bool:
    real = {os.path.realpath(known.path) for known in read_journal(journal).chain}
    return os.path.realpath(name) in real


def recover(
    where: Iterable[Path],
    *,
    back: bool = False,
    give_up_dropped: bool = False,
    qemu: QemuImg | None = None,
    observer: Observer | None = None,
) -> list[Recovered]:
    """Finish (or with `back` undo) the merges whose journals are given.

    Args:
        give_up_dropped: go back even where dropped points no longer read as before.

    Raises: `Refused` when an image is in use, is another file or has changed since, or
        when `back` comes too late or would leave points that are not what they were;
        `FailedMidway` when a step fails again. Repeating is always safe.
    """
    out = []
    for path in where:
        if path.suffix == ".new":
            discard_unwritten(path)
            continue
        way = _Way(back, give_up_dropped, qemu or QemuImg(), observer or Silent())
        done = _one(path, way)
        if done is not None:
            out.append(done)
    return out


@dataclass(frozen=True, slots=True)
class _Way:
    """What is wanted, and with what."""

    back: bool
    give_up_dropped: bool
    qemu: QemuImg
    observer: Observer


def _one(path: Path, way: _Way) -> Recovered | None:
    """Recover one merge; None when another process has just finished it."""
    while os.path.lexists(path):
        journal = read_journal(path)
        alone = {known.path for group in journal.groups for known in group.members}
        alone |= {journal.chain[index].path for index in journal.actives}
        with open_files(journal) as files:
            mine = [file for name, file in files.items() if name in alone]
            with sole(files.values(), mine):
                # Only now nobody else is at it; it may have gone on since it was read.
                if not path.exists():
                    return None
                again = read_journal(path)
                if (again.group, again.step) != (journal.group, journal.step):
                    continue
                discard_unwritten(path.with_name(f"{path.name}.new"))
                renumber(again, files)
                _require_any(again, files)
                return _recovered(again, way)
    return None


def _require_any(journal: Journal, files: Files) -> None:
    """Raise `Refused` when every image under way is another file: there is nothing to finish."""
    record = journal.groups[journal.group]
    # Not by their device: its number may be another one after a mount.
    there = {file.id.inode for file in files.values()}
    if there.isdisjoint(known.id.inode for known in (record.goal, *record.members)):
        why = "is about images that are not here any more: all were restored, it seems, or replaced"
        raise Refused(journal.path, why, given_up(journal))


def _recovered(journal: Journal, way: _Way) -> Recovered:
    way = replace(way, observer=Whole(way.observer, _left(journal)))
    for number in range(journal.group, len(journal.groups)):
        record = journal.groups[number]
        first = _where_to_begin(record, journal.step) if number == journal.group else 0
        if number != journal.group:
            journal.forget_deleted()
            journal.group, journal.step, journal.altered = number, 0, False
        if record.copy is not None and first == 0:
            # Made again in the same file: nobody, we included, may hold that one.
            journal.adopt(record.copy, None)
        with open_files(journal) as files:
            layers = layers_of(journal, files)
            alone = [*record.members, *(journal.chain[index] for index in journal.actives)]
            merged = [layers[known.id] for known in alone if known.id in layers]
            with ChainLocks(list(layers.values()), merged) as locks:
                _still(layers)
                if way.back:
                    run = GroupRun(record, [], journal.verify, way.qemu, way.observer, locks)
                    return _back(run, journal, way.give_up_dropped)
                _forward(journal, first, files, layers, way, locks)
    journal.remove()
    return Recovered(journal.path, journal.active, "finished")


def _left(journal: Journal) -> int:
    """Bytes that are still to be moved and compared."""
    first = _where_to_begin(journal.groups[journal.group], journal.step)
    ahead = [record.steps for record in journal.groups[journal.group :]]
    return weight_of([step for steps in ahead for step in steps]) - weight_of(ahead[0][:first])


def _still(layers: dict[FileId, Layer]) -> None:
    """Raise `Refused` when something was written between opening and locking."""
    for layer in layers.values():
        with HostFile(layer.path) as file:
            if (file.id, file.mtime_ns) != (layer.file.id, layer.file.mtime_ns):
                raise Refused(layer.path, "is being changed", "try again when nobody uses it")


def _where_to_begin(record: GroupRecord, step: int) -> int:
    """The step to repeat.

    Where the native engine has not switched yet: all that it does, for a guest may have run.

    For a flush or a look at a header: the command before it. What it wrote may be lost. A copy
    that has no name yet is made again. For a bitmap command the first of its run: killed, it
    leaves all bitmaps of its image in use.
    """
    steps, begin = record.steps, step
    if record.copy is not None and not _has_its_name(record, step):
        return 0
    written = next((n for n, each in enumerate(steps) if isinstance(each, NativeWrite)), step)
    if written < step and not _past_switch(record, step):
        return written
    while begin > 0 and isinstance(steps[begin], (Sync, Confirm, ConfirmBitmaps, SymbolicLink)):
        begin -= 1
    while begin > 0 and bitmap_command(steps[begin]) and isinstance(steps[begin - 1], Command):
        begin -= 1
    if not isinstance(steps[begin], (Command, NativeFree)):
        return step
    while begin > 0 and _creates(record, begin) and _creates(record, begin - 1):
        begin -= 1
    return begin


def _past_switch(record: GroupRecord, step: int) -> bool:
    """Whether the native engine's header write has been done."""
    switch = next(n for n, each in enumerate(record.steps) if isinstance(each, NativeSwitch))
    if step != switch:
        return step > switch
    # Imported late: qemu-img is the usual engine.
    from qchain.run.native import switched_already

    return switched_already(record)


def _has_its_name(record: GroupRecord, step: int) -> bool:
    """Whether the new file of a copy has taken the place of another one."""
    switch = next(n for n, each in enumerate(record.steps) if isinstance(each, Rename))
    return step > switch or (step == switch and not os.path.lexists(record.goal.path))


def _creates(record: GroupRecord, index: int) -> bool:
    step = record.steps[index]
    return isinstance(step, Command) and step.argv[0] == "create"


def _forward(
    journal: Journal,
    first: int,
    files: Files,
    layers: dict[FileId, Layer],
    way: _Way,
    locks: ChainLocks,
) -> None:
    """Finish the group under way."""
    record = journal.groups[journal.group]
    changed = examine(journal, record, first, files)
    refuse_overlays(journal, first, "or try 'qchain recover --back'")
    native = any(isinstance(step, NativeWrite) for step in record.steps)
    kept = record.layers[0]
    # By a guest, or by the merge itself, which may only have opened it.
    written = kept.path not in files or state_of(files[kept.path]) != kept.state
    content = any(moves_content(step) for step in record.steps[first:]) or (changed and native)
    views = [layers[known.id] for known in record.layers] if content else []
    run = GroupRun(record, views, journal.verify, way.qemu, way.observer, locks)
    run.journal = journal
    resume(run, first)
    try:
        follow_kept(run, journal, first)
        if changed:
            _carry(run, journal, first, layers)
        if written:
            _take_manifest_again(run, first)
    except BaseException:
        run.close()
        raise
    run_group(run, journal, journal.group, first)


def _take_manifest_again(run: GroupRun, first: int) -> None:
    """Of the kept image as it is now.

    Not where qemu-img merges into it: its old view holds nothing newer.
    """
    record = run.record
    native = any(isinstance(step, NativeWrite) for step in record.steps)
    if record.target == 0 and record.copy is None and not native:
        return
    if not any(isinstance(step, Compare) for step in record.steps[first:]):
        return
    for step in record.steps[:first]:
        if isinstance(step, TakeManifest):
            run.perform(step)


def _carry(run: GroupRun, journal: Journal, first: int, layers: dict[FileId, Layer]) -> None:
    """Take over into the target what a guest has written to the kept image since.

    The commit is done again, unless all of it is in the target already. Until then the
    journal says so, for the target may be written to in part.

    Raises: `FailedMidway` when the target still lacks something.
    """
    record = run.record
    ahead = record.steps[first:]
    # Where the comparison of the merge itself is to come, it will judge.
    judged = any(is_pull(step) or isinstance(step, (Compare, NativeWrite)) for step in ahead)
    if journal.carrying or judged or not _all_there(record, layers):
        journal.carrying = True
        begin = next(n for n, step in enumerate(record.steps) if _moves_in(step))
        native = isinstance(record.steps[begin], NativeWrite)
        for step in record.steps[begin:first]:
            if native and isinstance(step, _NATIVE):
                journal.write(journal.group, first, written_by(step))
                if isinstance(step, Compare):
                    # The digests are of what the kept image showed before.
                    step = replace(step, manifest=None)
            elif isinstance(step, Command) and (is_commit(step) or step.argv[0] == "resize"):
                journal.write(journal.group, first, step.writes)
            elif not isinstance(step, Sync):
                break
            run.perform(step)
        if not (judged or _all_there(record, layers)):
            raise FailedMidway(
                record.layers[0].path,
                "was written to after the merge had stopped, and not all of that could be "
                "taken over; nothing was deleted",
                "'qchain recover --back'",
            )
    place_again(run, journal, first)
    journal.unsettled |= journal.indices([record.layers[0].path, run.t_path])
    journal.settle()
    journal.carrying = False
    journal.write(journal.group, first)


_NATIVE = (NativeWrite, Compare, NativeSwitch, Confirm, NativeFree)


def _moves_in(step: Step) -> bool:
    """Whether it brings what the kept image holds into the target."""
    return is_commit(step) or isinstance(step, NativeWrite)


def _all_there(record: GroupRecord, layers: dict[FileId, Layer]) -> bool:
    """Whether the target, over the new backing, shows all that the kept image shows."""
    known = record.layers[record.target]
    with HostFile(known.path) as file:
        target = open_layer(known.path, file, known.format, Gate(), known.path)
        upper = [layers[each.id] for each in record.layers[: record.target]]
        lower = record.layers[record.count :]
        below = [layers[each.id] for each in lower]
        if target.size != upper[0].size:
            return False
        return compare([*upper, target, *below], [target, *below], stop_early=True).identical


def _back(run: GroupRun, journal: Journal, give_up_dropped: bool) -> Recovered:
    """Undo the group under way; what it had begun may have been done or not."""
    run.journal = journal
    resume(run, journal.step)
    resume_at(run, journal.step)
    if run.switched:
        raise Refused(
            journal.active,
            "the merge has already switched to its result; it can only go forward",
            "run 'qchain recover' without --back",
        )
    altered = altered_points(run, journal.step)
    if altered and not give_up_dropped:
        raise Refused(
            journal.active,
            f"the commit had begun: of the points to be dropped, {named(altered)} no longer "
            "read as before, and going back does not change that",
            "run 'qchain recover' to finish, or add --give-up-dropped to go back all the same",
        )
    _require_way_back(run)
    follow_kept(run, journal, journal.step)
    if not put_back(run):
        raise FailedMidway(journal.active, "could not be put back as it was")
    journal.remove()
    return Recovered(journal.path, journal.active, "put back", tuple(altered))


def _require_way_back(run: GroupRun) -> None:
    """Raise `Refused` where the target's header would be led to what is not there any more."""
    try:
        away = led_away(run)
    except (QchainError, OSError):
        return  # going back says so
    if away:
        try:
            require_old_chain(run)
        except FailedMidway as error:
            raise Refused(error.what, error.why, "put back what was there") from None
