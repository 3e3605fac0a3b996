"""The files of an unfinished merge as they are now, against what its journal says of them.

Between a stop and its recovery anything may happen: a guest runs, a file is restored
from a backup, deleted, taken for something else, the file system comes back under
another device number. What the rest of the merge would touch must be the very files
that it knows, as they were left; only the kept image may have gone on meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from qchain.chain.chain import open_layer
from qchain.chain.gate import Gate
from qchain.chain.layer import Layer
from qchain.chain.scan import identity
from qchain.errors import Refused
from qchain.hostfile import FileId, HostFile
from qchain.plan.refusals import stranger_refusals
from qchain.plan.steps import (
    Command,
    Compare,
    Confirm,
    Freeze,
    NativeCopy,
    NativeWrite,
    Rename,
    Step,
    TakeManifest,
    Unlink,
)
from qchain.qcow2.header import read_header
from qchain.run.identity import state_of
from qchain.run.journal import GroupRecord, Journal, LayerRecord

__all__ = [
    "Files",
    "examine",
    "is_commit",
    "is_pull",
    "layers_of",
    "moves_content",
    "open_files",
    "refuse_overlays",
    "renumber",
]

_BACK = "put back what was there, or try 'qchain recover --back'"
_ASIDE = "put it under another name, then 'qchain recover' again"

Files = Mapping[Path, HostFile]
"""The names of a chain that lead to something, and the open files."""


@contextmanager
def open_files(journal: Journal) -> Iterator[Files]:
    """What the names of the chain lead to now; two names of one file share one opening.

    Raises: `Refused` where a name has become a link, `ImageError` for what is no file.
    """
    members = {known.path for group in journal.groups for known in group.members}
    _make_room(len(journal.chain))
    found: dict[Path, HostFile] = {}
    by_id: dict[FileId, HostFile] = {}
    with contextlib.ExitStack() as stack:
        for known in journal.chain:
            # Of what is not known by its number, such as a copy that is to be made again, no
            # file is ours; it may even have the number of one that was deleted.
            if known.id.inode == 0 or not os.path.lexists(known.path):
                continue
            file = HostFile(known.path)
            linked = known.path.is_symlink() and not file.is_block_device
            if known.path in members and linked:
                file.close()
                raise Refused(known.path, "has become a symbolic link", "put the image back there")
            if file.id in by_id:
                file.close()
            else:
                by_id[file.id] = stack.enter_context(file)
            found[known.path] = by_id[file.id]
        yield found


def _make_room(depth: int) -> None:
    """Raise the limit of open files: each layer is opened to hold it, and to work with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * depth + 1024
    if soft < wanted and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, wanted), hard))


def renumber(journal: Journal, files: Files) -> None:
    """Take over new device numbers: the same files, on a file system mounted anew.

    A number is taken over when a file of that inode, size and header has it, and no
    file of the chain still has the old one. Where all were being written to, size and header
    say nothing: then all of them must have their names and inodes on the same new one.
    """
    by_inode: dict[int, list[HostFile]] = {}
    for file in files.values():
        by_inode.setdefault(file.id.inode, []).append(file)
    present = {file.id for file in files.values()}
    new: dict[int, int] = {}
    for index, known in enumerate(journal.chain):
        if known.id.device == -1:
            _same_device(journal, index, files.get(known.path))
            continue
        for file in by_inode.get(known.id.inode, []):
            alike = index not in journal.unsettled and state_of(file).same_content(known.state)
            if alike and not file.is_block_device:
                new[known.id.device] = file.id.device
    for device in {known.id.device for known in journal.chain} - {-1, *new}:
        there = [n for n, known in enumerate(journal.chain) if known.id.device == device]
        moved = {_moved_to(journal.chain[index], files) for index in there}
        if len(moved) == 1 and None not in moved and journal.unsettled.issuperset(there):
            new[device] = moved.pop() or 0
    for known in journal.chain:
        if known.id in present:
            new.pop(known.id.device, None)
    for index, known in enumerate(journal.chain):
        device = new.get(known.id.device, known.id.device)
        journal.chain[index] = replace(known, id=FileId(device, known.id.inode))


def _moved_to(known: LayerRecord, files: Files) -> int | None:
    """The device on which its name leads to a file of its inode; None if none does."""
    file = files.get(known.path)
    if file is None or file.is_block_device or file.id.inode != known.id.inode:
        return None
    return file.id.device


def _same_device(journal: Journal, index: int, file: HostFile | None) -> None:
    """A block device is known by what is on it; what the merge was writing to, by its name."""
    known = journal.chain[index]
    if file is None or not file.is_block_device:
        return
    state = state_of(file)
    ours = index in journal.unsettled and state.size == known.state.size
    if ours or state.same_content(known.state):
        journal.chain[index] = replace(known, id=file.id)


def layers_of(journal: Journal, files: Files) -> dict[FileId, Layer]:
    """The images of the chain that there still are, whatever their names, active first."""
    where = {file.id: file for file in files.values()}
    out: dict[FileId, Layer] = {}
    for known in journal.chain:
        file = where.get(known.id)
        if file is not None and known.id not in out:
            # No other file that an image names is opened: it has no say here.
            out[known.id] = open_layer(file.path, file, known.format, Gate(), file.path)
    return out


# --- the steps ahead ------------------------------------------------------------------


def is_commit(step: Step) -> TypeGuard[Command]:
    return isinstance(step, Command) and step.commits


def is_pull(step: Step) -> bool:
    return isinstance(step, Command) and step.argv[0] == "rebase" and "-u" not in step.argv


def moves_content(step: Step) -> bool:
    """Whether the step looks into the images, and does not only change names and headers."""
    looks = isinstance(step, (Freeze, TakeManifest, Compare, NativeCopy, NativeWrite))
    return looks or is_commit(step) or is_pull(step)


def examine(journal: Journal, record: GroupRecord, first: int, files: Files) -> bool:
    """Whether the files are those that the steps from `first` on are about.

    Returns: whether the kept image was written to since, so that the target lacks
        something of it.

    Raises: `Refused` for any other difference; nothing has been changed.
    """
    ahead = record.steps[first:]
    kept, target = record.layers[0], record.goal
    content = any(moves_content(step) for step in ahead)
    if record.onto and any(isinstance(step, Confirm) for step in ahead):
        # Until its header is switched the image is to read the same over either chain.
        for known in record.layers[1:]:
            _require(files, known, _BACK)
            if _differs(journal, known, files):
                why = "has changed since the rebase was stopped, so that nothing is proven"
                raise Refused(known.path, why, "'qchain recover --back'")
    # As long as the kept image is to be replaced or deleted, it is what a guest may use.
    own = _id(files, kept.path) == kept.id
    live = content or (own and any(_ends(step, kept.path) for step in ahead))
    todo = _BACK if live else _ASIDE
    if content:
        for known in record.layers:
            _require(files, known, todo)
    named = {known.path: known for known in record.members}
    for step in ahead:
        image = None
        match step:
            case Unlink(path) if path in files:
                image = named.get(path)
            case Rename(old, new) if _id(files, new) != target.id:
                image = named[new]
                if old == target.path and record.copy is None:
                    _require(files, target, todo)
            case _:
                pass
        if image is not None:
            _require(files, image, todo)
            _unchanged(journal, image, files, todo, kept, target)
    header = None
    if own and kept.format == "qcow2" and any(_concerns(step, kept.path) for step in ahead):
        with HostFile(kept.path) as file:
            header = read_header(file)
    if header is not None and header.nb_snapshots:
        # It reads through the present backing, under a target as well as in one.
        raise Refused(
            kept.path,
            "holds an internal snapshot now, which the rest of the merge would lose",
            "delete it ('qemu-img snapshot -d'), or try 'qchain recover --back'",
        )
    if not live or not own or (record.target == 0 and record.copy is None):
        return False
    for known in record.layers[1 : record.target + 1]:
        _require(files, known, todo)
        _unchanged(journal, known, files, todo, kept)
    if record.copy is not None:
        _nothing_since_the_copy(journal, record, files)
    # A commit that opens the kept image itself began when that had no bitmaps.
    bare = record.copy is not None or any(
        (is_commit(step) and kept.path in step.writes) or isinstance(step, NativeWrite)
        for step in record.steps
    )
    if bare and header is not None and header.bitmaps_extension is not None:
        raise Refused(
            kept.path,
            "has bitmaps now, which the rest of the merge would lose",
            "remove them ('qemu-img bitmap --remove'), or try 'qchain recover --back'",
        )
    # A copy that had no name yet is made again, with whatever is in the kept image now.
    # Of a device only its header tells: what was written to its data is taken over anyhow.
    device = files[kept.path].is_block_device
    return record.copy is None and (device or journal.carrying or _differs(journal, kept, files))


def _nothing_since_the_copy(journal: Journal, record: GroupRecord, files: Files) -> None:
    """Where the copy has its name already, it is not made again: nothing may be newer."""
    kept = record.layers[0]
    final = next(step.new for step in record.steps if isinstance(step, Rename))
    if _id(files, final) == record.goal.id and _differs(journal, kept, files):
        raise Refused(
            kept.path,
            f"was written to after {final.name} had become what it was, which lacks that",
            f"'qemu-img rebase -u -b {final} -F {record.goal.format}' it, put it under another "
            "name, then 'qchain recover' again",
        )


def _concerns(step: Step, kept: Path) -> bool:
    return _ends(step, kept) or (isinstance(step, Command) and kept in step.writes)


def _ends(step: Step, kept: Path) -> bool:
    return (isinstance(step, Unlink) and step.path == kept) or (
        isinstance(step, Rename) and step.new == kept
    )


def _id(files: Files, path: Path) -> FileId | None:
    return files[path].id if path in files else None


def _require(files: Files, known: LayerRecord, todo: str) -> None:
    found = _id(files, known.path)
    if found is None:
        raise Refused(known.path, "is missing, and the merge is not finished", todo)
    if found != known.id:
        raise Refused(known.path, "is another file than the one the merge began with", todo)


def _unchanged(
    journal: Journal, known: LayerRecord, files: Files, todo: str, *but: LayerRecord
) -> None:
    if known not in but and _differs(journal, known, files):
        raise Refused(
            known.path, "has changed since the merge was stopped, and was to be dropped", todo
        )


def _differs(journal: Journal, known: LayerRecord, files: Files) -> bool:
    if journal.chain.index(known) in journal.unsettled:
        return False  # the merge itself was at it
    return state_of(files[known.path]) != known.state


# --- who else needs the files ---------------------------------------------------------


def refuse_overlays(journal: Journal, first: int, todo: str = "") -> None:
    """Raise `Refused` when an image outside the chain backs on what is still to be changed.

    A snapshot may have been taken since the merge was planned, or stopped, or while qemu-img
    worked. `first`: where the present group goes on.
    """
    touched: dict[FileId, Path] = {}
    places: set[Path] = set()
    for number in range(journal.group, len(journal.groups)):
        record = journal.groups[number]
        ahead = record.steps[first if number == journal.group else 0 :]
        ends = _touched(journal, record, ahead)
        for known in record.members:
            places.add(known.path.parent)
            if known.path in ends and identity(known.path) == known.id:
                touched[known.id] = known.path
    # The number of a file that was deleted may be anybody's by now.
    there = {identity(known.path) for known in journal.chain}
    chain = {known.id for known in journal.chain if known.id in there}
    for line in stranger_refusals(touched, chain, [*sorted(places), *journal.scan]):
        raise Refused("merge", line, todo)


def _touched(journal: Journal, record: GroupRecord, ahead: tuple[Step, ...]) -> set[Path]:
    """The images of which the steps ahead change the content, or end the name."""
    # A kept name that stays what it was concerns nobody above it.
    stays = journal.names == "kept" and not journal.allow_format_change
    out = {step.path for step in ahead if isinstance(step, Unlink)}
    out |= {name for step in ahead if isinstance(step, Rename) for name in (step.old, step.new)}
    if any(moves_content(step) for step in ahead):
        out |= {known.path for known in record.members}
    return out - {record.layers[0].path} if stays else out
