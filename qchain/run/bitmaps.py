"""Bitmaps while a group is merged: commands that may be repeated, their outcome read again.

What is saved in the work file (`qchain.plan.bitmapsteps`) is as the kept image was then. A
guest that runs between a stop and the recovery writes to that image, and what it writes must
be in the result's bitmaps too. The kept image's own bitmap tells, if it recorded; otherwise
all that the image allocates is taken for written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from qchain.chain.chain import open_layer
from qchain.chain.extents import extents
from qchain.chain.gate import Gate
from qchain.errors import FailedMidway, QchainError, Refused
from qchain.hostfile import HostFile
from qchain.plan.bitmapsteps import BITMAPS
from qchain.plan.commands import bitmap_merge_argv
from qchain.plan.steps import Command, ConfirmBitmaps, Step
from qchain.qcow2.bitmaps import Bitmap, dirty_ranges, read_bitmaps
from qchain.qcow2.header import Header, read_header
from qchain.qcow2.newbitmaps import NewBitmap, union, write_bitmaps
from qchain.run.durable import rename_durably
from qchain.run.identity import state_of
from qchain.run.journal import GroupRecord, Journal
from qchain.run.private import open_private

if TYPE_CHECKING:
    from qchain.run.group import GroupRun

__all__ = [
    "as_it_is",
    "bitmap_command",
    "confirm_bitmaps",
    "follow_kept",
    "give_back",
    "place_again",
]


class _Image:
    """The bitmaps of a file, open."""

    def __init__(self, path: Path) -> None:
        self.file = HostFile(path)
        try:
            self.header: Header = read_header(self.file)
            self.all: dict[str, Bitmap] = {
                each.name: each for each in read_bitmaps(self.file, self.header)
            }
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> _Image:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def usable(self, name: str) -> bool:
        return name in self.all and not self.all[name].in_use

    def ranges(self, name: str) -> Iterator[tuple[int, int]]:
        return dirty_ranges(self.file, self.header, self.all[name])


def bitmap_command(step: Step) -> bool:
    return isinstance(step, Command) and step.argv[0] == "bitmap"


def as_it_is(step: Command) -> Command | None:
    """The command for the image as it is now: what was done before is not in its way.

    None where nothing is left to be removed.
    """
    name = step.argv[-1]
    with _Image(step.writes[0]) as image:
        there = name in image.all
    words = [word for word in step.argv[:-2] if word != "--remove"]
    if "--add" not in words:
        return step if there or words == list(step.argv[:-2]) else None
    if there:
        words.insert(words.index("--add"), "--remove")
    return replace(step, argv=(*words, *step.argv[-2:]))


def confirm_bitmaps(step: ConfirmBitmaps, steps: Iterable[Step]) -> None:
    """Hold the bitmaps of an image against what `steps` merged into it.

    Raises: `FailedMidway` when one is missing, in use, differs, or should be gone.
    """
    sources: dict[str, list[Path]] = {}
    for each in steps:
        if isinstance(each, Command) and bitmap_command(each) and each.writes == (step.image,):
            argv = each.argv
            if "-b" in argv[:-2]:
                sources.setdefault(argv[-1], []).append(Path(argv[argv.index("-b") + 1]))
    with _Image(step.image) as image:
        for name in step.gone:
            if name in image.all:
                raise FailedMidway(step.image, f"still has the bitmap {name!r}")
        for name in step.names:
            if not image.usable(name):
                raise FailedMidway(step.image, f"lacks the bitmap {name!r}, or left it in use")
            _same(image, name, sources.get(name, []))


def _same(image: _Image, name: str, sources: Iterable[Path]) -> None:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_Image(path)) for path in sources]
        for each in opened:
            if not each.usable(name):
                raise FailedMidway(each.file.path, f"has no usable bitmap {name!r} any more")
        granularity = image.all[name].granularity
        wanted = union([each.ranges(name) for each in opened], granularity, image.header.size)
        for found, expected in zip_longest(image.ranges(name), wanted):
            if found != expected:
                at = min(each[0] for each in (found, expected) if each is not None)
                raise FailedMidway(
                    image.file.path, f"its bitmap {name!r} is not what it should be, from {at} on"
                )


# --- where a merge is stopped ------------------------------------------------------------


def _saved(record: GroupRecord) -> Path | None:
    """The work file with the saved bitmaps, where the group carries any."""
    for step in record.steps:
        if isinstance(step, ConfirmBitmaps) and step.names and step.image.name == BITMAPS:
            return step.image
    return None


def _confirmed(record: GroupRecord, image: Path) -> int:
    """The number of the step that last looks at the bitmaps of `image`."""
    return max(
        number
        for number, step in enumerate(record.steps)
        if isinstance(step, ConfirmBitmaps) and step.image == image
    )


def follow_kept(run: GroupRun, journal: Journal, first: int) -> None:
    """Take what a guest wrote to the kept image since the stop into the saved bitmaps.

    Args:
        first: the step at which the merge goes on.

    Raises: `Refused` when the kept image has new bitmaps, which would be lost.
    """
    record, saved = run.record, _saved(run.record)
    if saved is not None:
        _draft(saved).unlink(missing_ok=True)
    if saved is None or not saved.exists() or first <= _confirmed(record, saved):
        return  # nothing of it, or it is made anew
    kept, pull = record.layers[0], record.target == 0
    if pull and first > _confirmed(record, run.t_path):
        return
    try:
        image = _Image(kept.path)
    except QchainError:
        return
    with image:
        ours = journal.chain.index(kept) in journal.unsettled
        same = state_of(image.file) == kept.state
        if image.file.id != kept.id or (same and not journal.carrying):
            return
        with _Image(saved) as known:
            if not pull:
                new = set(image.all) - set(known.all) - _others(record, saved)
                if new:
                    raise Refused(
                        kept.path,
                        f"has the bitmap {sorted(new)[0]!r} since the merge was stopped, which "
                        "the rest of it would lose",
                        "remove it ('qemu-img bitmap --remove'), or try 'qchain recover --back'",
                    )
            _widen(known, image, saved, trusted=not pull and not ours)


def _others(record: GroupRecord, saved: Path) -> set[str]:
    """The names that the kept image had besides what was saved."""
    step = record.steps[_confirmed(record, saved)]
    assert isinstance(step, ConfirmBitmaps)
    return set(step.gone)


def _widen(known: _Image, kept: _Image, saved: Path, trusted: bool) -> None:
    """Write the saved bitmaps anew, with what was written to the kept image since."""
    layer = open_layer(kept.file.path, kept.file, "qcow2", Gate(), kept.file.path)
    made = []
    size = known.header.size
    for name, bitmap in known.all.items():
        auto = "auto" in bitmap.flags
        more: Iterable[tuple[int, int]] = ()
        if auto and trusted and kept.usable(name):
            more = kept.ranges(name)
        elif auto:
            more = ((each.start, each.length) for each in extents([layer]) if each.present)
        ranges = union([known.ranges(name), more], bitmap.granularity, size)
        made.append(NewBitmap(name, bitmap.granularity, auto, ranges))
    draft = _draft(saved)
    with os.fdopen(open_private(draft), "r+b") as file:
        write_bitmaps(file, size, made)
    rename_durably(draft, saved)


def _draft(saved: Path) -> Path:
    return saved.with_name(f"{saved.name}.new")


def place_again(run: GroupRun, journal: Journal, first: int) -> None:
    """Put the saved bitmaps in place once more where that is done already (before `first`)."""
    record = run.record
    if _saved(record) is None or first <= _confirmed(record, run.t_path):
        return
    for step in record.steps[:first]:
        into = isinstance(step, Command) and bitmap_command(step) and step.writes == (run.t_path,)
        if into or (isinstance(step, ConfirmBitmaps) and step.image == run.t_path and step.names):
            journal.write(journal.group, first, step.writes if isinstance(step, Command) else ())
            run.perform(step)


def give_back(run: GroupRun, altered: bool) -> None:
    """Where the target is put back, give it again the bitmaps that the merge took from it.

    As they were saved, so that they may mark more than they did. A commit that has begun
    has changed what they are about (`altered`): then they stay away.
    """
    record, saved = run.record, _saved(run.record)
    journal = run.journal
    if saved is None or not saved.exists() or journal is None:
        return
    if journal.step <= _confirmed(record, saved) or altered:
        return
    taken = {
        step.argv[-1]
        for step in record.steps
        if isinstance(step, Command) and bitmap_command(step) and "--remove" in step.argv[:-2]
    }
    with _Image(saved) as known, _Image(run.t_path) as image:
        todo = [
            (name, bitmap)
            for name, bitmap in known.all.items()
            if name in taken and known.usable(name) and not image.usable(name)
        ]
    for name, bitmap in todo:
        new = (bitmap.granularity, "auto" in bitmap.flags)
        argv = bitmap_merge_argv(run.t_path, name, saved, new)
        run.perform(Command(tuple(argv), writes=(run.t_path,)))
