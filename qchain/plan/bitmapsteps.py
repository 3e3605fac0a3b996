"""The steps that carry bitmaps: saved before anything is written, placed before the switch.

The kept image's bitmaps are never at stake: a commit goes through an empty overlay above it,
for qemu-img marks the bitmaps of what it opens for writing as in use, and, killed, leaves them
so. What is saved lies in one work file until the merge is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qchain.chain.layer import Layer
from qchain.plan.bitmaps import Fate
from qchain.plan.commands import bitmap_merge_argv, bitmap_remove_argv, create_empty_argv
from qchain.plan.steps import Command, ConfirmBitmaps, Step, Sync

__all__ = ["BITMAPS", "COVER", "cover", "place", "prune", "save"]

BITMAPS, COVER = "bitmaps", "cover"
"""Names in the work directory: the file that holds the bitmaps, the overlay for the commit."""


def save(layers: Sequence[Layer], fate: Fate, work: Path, size: int) -> list[Step]:
    """The union of the bitmaps of each name, in a work file of its own.

    Args:
        size: of the disk, in bytes.
    """
    if not fate.carried:
        return []
    saved = work / BITMAPS
    steps: list[Step] = [
        Command(tuple(create_empty_argv(saved, size)), cwd=work.parent, label="prepare")
    ]
    for each in fate.carried:
        new: tuple[int, bool] | None = (each.granularity, each.auto)
        for index in each.sources:
            argv = bitmap_merge_argv(saved, each.name, layers[index].path.absolute(), new)
            steps.append(_command(argv, saved, f"save bitmap {each.name}"))
            new = None
    names = tuple(each.name for each in fate.carried)
    return [*steps, Sync(saved), Sync(work), ConfirmBitmaps(saved, names, fate.others)]


def prune(target: Path, names: Sequence[str]) -> list[Step]:
    """No bitmap of these names in `target` any more: they would be wrong, or are stale.

    A stale one also keeps an image from growing.
    """
    if not names:
        return []
    return [
        *(
            _command(bitmap_remove_argv(target, name), target, f"remove bitmap {name}")
            for name in names
        ),
        Sync(target),
        ConfirmBitmaps(target, (), tuple(names)),
    ]


def place(fate: Fate, target: Path, work: Path, kept: int | None) -> list[Step]:
    """The saved bitmaps in the result, which has its content by now.

    Args:
        kept: the layer index of the kept image where that is the target (a pull): then they
            take the place of what is there.
    """
    gone = () if kept is None else fate.removed
    if not fate.carried:
        return prune(target, gone)
    steps: list[Step] = [
        _command(bitmap_remove_argv(target, name), target, f"remove bitmap {name}") for name in gone
    ]
    for each in fate.carried:
        new = (each.granularity, each.auto)
        there = kept in each.sources
        argv = bitmap_merge_argv(target, each.name, work / BITMAPS, new, there)
        steps.append(_command(argv, target, f"carry bitmap {each.name}"))
    names = tuple(each.name for each in fate.carried)
    return [*steps, Sync(target), ConfirmBitmaps(target, names, gone)]


def cover(kept: Path, size: int, work: Path) -> list[Step]:
    """An empty overlay of the kept image, in the place of which it is committed."""
    made = work / COVER
    argv = create_empty_argv(made, size, kept, "qcow2")
    return [Command(tuple(argv), cwd=work.parent, label="prepare"), Sync(made), Sync(work)]


def _command(argv: list[str], image: Path, label: str) -> Command:
    return Command(tuple(argv), label=label, writes=(image,))
