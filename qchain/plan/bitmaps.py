"""What becomes of persistent dirty bitmaps when layers merge.

A bitmap in an image records which parts of that image's point were written to since it was
made. libvirt and oVirt give every new overlay a bitmap of each name that the image below
has, so that the changes since a checkpoint are the union of the bitmaps of one name, from
the active image down to the layer in which it was made:

    base(b) <- mon(b) <- tue(b)        since b: base's b, and mon's, and tue's

- When layers merge, the result's b is the union of theirs. It may be larger: a backup then
  copies more than it must. Were it smaller, a backup would lack data, and nobody would know.
- A layer without a usable b ends its history: what was written there is in no bitmap. Below
  such a gap an `auto` bitmap (one that records) says nothing about the kept point, and is
  not carried; libvirt and oVirt take it for stale too. Where b comes again below the gap, it
  is of no use above it either, for after the merge nobody would see the gap.
- One that does not record (not `auto`) speaks of a time that is over: no gap harms it.
- One that is `in-use` was not stored properly, and is as good as none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.errors import ImageError
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Group
from qchain.qcow2.bitmaps import Bitmap, read_bitmaps

__all__ = [
    "Carried",
    "Fate",
    "Lost",
    "bitmap_obstacle",
    "bitmap_refusals",
    "fate_of",
    "has_bitmaps",
]

_FLAGS = "--bitmaps carry keeps what is valid, --bitmaps drop gives it up"


@dataclass(frozen=True, slots=True)
class Carried:
    """A bitmap of the result: the union of those of its name in `sources` (layer indices).

    `auto`: it goes on recording. `granularity`: in bytes, that of the uppermost.
    """

    name: str
    granularity: int
    auto: bool
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """A bitmap that vanishes with the merge, and why."""

    image: Path
    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of the bitmaps of a group.

    Attributes:
        removed: names that go from the target, before it is written to; from the kept
            image itself only after it has been pulled into.
        others: names that the kept image has besides the carried ones.
    """

    carried: tuple[Carried, ...] = ()
    lost: tuple[Lost, ...] = ()
    removed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def as_json(self, mode: str) -> dict[str, object]:
        """For `--json`: the mode, the names carried, and what is lost, where and why."""
        lost = [
            {"image": str(each.image.absolute()), "name": each.name, "why": each.why}
            for each in self.lost
        ]
        return {"mode": mode, "carried": [each.name for each in self.carried], "lost": lost}


NOTHING = Fate()


@dataclass
class _History:
    """The bitmaps of one name in a line, by place; the kept image is at 0."""

    held: dict[int, Bitmap]

    @cached_property
    def gap(self) -> int | None:
        """The first layer without one that has one below it; None where there is no gap."""
        missing = next(place for place in range(len(self.held) + 1) if place not in self.held)
        return missing if missing < max(self.held) else None

    @cached_property
    def records(self) -> bool:
        return any("auto" in each.flags for each in self.held.values())

    @property
    def valid(self) -> bool:
        return not self.records or self.gap is None


_known: WeakKeyDictionary[Layer, dict[int, dict[str, _History]]] = WeakKeyDictionary()
"""By kept image, whose line is always the same, and by count: asked for with every target."""


def has_bitmaps(layer: Layer) -> bool:
    """Whether the image has bitmaps that are not stale as a whole."""
    return layer.header is not None and layer.header.bitmaps_extension is not None


def _bitmaps(layer: Layer) -> list[Bitmap]:
    return [] if layer.header is None else read_bitmaps(layer.file, layer.header)


def _histories(layers: Sequence[Layer], group: Group) -> dict[str, _History]:
    """Every name that an image of the group has a usable bitmap of."""
    line = [layers[index] for index in group.line]
    known = _known.setdefault(line[0], {})
    if group.count not in known:
        out: dict[str, _History] = {}
        if any(map(has_bitmaps, line[: group.count])):
            for place, layer in enumerate(line):
                for bitmap in _bitmaps(layer):
                    if not bitmap.in_use and (place < group.count or bitmap.name in out):
                        out.setdefault(bitmap.name, _History({})).held[place] = bitmap
        known[group.count] = out
    return known[group.count]


def fate_of(
    layers: Sequence[Layer], group: Group, target: int | None, options: MergeOptions
) -> Fate:
    """What becomes of the bitmaps of `group` when `target` receives the data.

    Args:
        target: a layer index; None for a copy.

    Raises: `ImageError` for bitmaps that cannot be read.
    """
    members = [layers[index] for index in group.members]
    if options.bitmaps == "refuse" or not any(map(has_bitmaps, members)):
        return Fate()
    line = [layers[index] for index in group.line]
    histories = _histories(layers, group)
    pull = target == group.kept
    carried: list[Carried] = []
    gaps: dict[str, str] = {}
    stay: set[str] = set()
    for name, history in histories.items():
        if options.bitmaps == "drop":
            whole = all(
                place == 0 or (place >= group.count and not history.records)
                for place in history.held
            )
            if pull and whole:
                stay.add(name)
        elif not history.valid:
            assert history.gap is not None
            gaps[name] = line[history.gap].path.name
        else:
            sources = tuple(group.line[place] for place in history.held if place < group.count)
            first = history.held[min(history.held)]
            carried.append(Carried(name, first.granularity, "auto" in first.flags, sources))
    kept_on = {each.name for each in carried}
    lost = []
    for index in group.owned:
        for bitmap in _bitmaps(layers[index]):
            if bitmap.in_use:
                said = "it is stale: its image was not closed properly"
            elif bitmap.name in kept_on or (index == group.kept and bitmap.name in stay):
                continue
            elif options.bitmaps == "carry":
                said = f"{gaps[bitmap.name]} does not continue it"
            elif pull and index == group.kept:
                said = "it would seem whole, and lack what other images recorded"
            else:
                said = "dropped, as asked"
            lost.append(Lost(layers[index].path, bitmap.name, said))
    there = [] if target is None else [bitmap.name for bitmap in _bitmaps(layers[target])]
    return Fate(
        tuple(carried),
        tuple(lost),
        tuple(name for name in there if not (pull and name in kept_on | stay)),
        tuple(each.name for each in _bitmaps(members[0]) if each.name not in kept_on),
    )


def bitmap_refusals(layers: Sequence[Layer], group: Group, options: MergeOptions) -> list[str]:
    """What speaks against the merge, whatever the target."""
    line = [layers[index] for index in group.line]
    members = line[: group.count]
    if not any(map(has_bitmaps, members)):
        return []
    if options.bitmaps == "refuse":
        out = [
            f"{layer.path}: holds bitmaps that would be lost; {_FLAGS}"
            for layer in members[1:]
            if has_bitmaps(layer)
        ]
        if out:
            return out
    try:
        histories = _histories(layers, group)
        for layer in members:
            _bitmaps(layer)
    except ImageError as error:
        return [f"{error.what}: its bitmaps cannot be read ({error.why}); remove them first"]
    if options.bitmaps == "drop":
        return []
    out = []
    for name, history in histories.items():
        if options.bitmaps == "refuse":
            again = [place for place in history.held if place >= group.count]
            if again and history.records:
                out.append(
                    f"{members[0].path}: its bitmap {name!r} would seem to continue that of "
                    f"{line[again[0]].path.name}, and what lies between recorded nothing; remove "
                    f"it, or see --bitmaps"
                )
        elif history.valid:
            out += [
                f"{line[place].path}: its bitmap {name!r} is of a disk of {line[place].size} "
                f"bytes, that of {members[0].path.name} of {members[0].size}, and qemu merges "
                "only bitmaps of one size; use --bitmaps drop"
                for place in history.held
                if place < group.count and line[place].size != members[0].size
            ]
    return out


def bitmap_obstacle(
    layers: Sequence[Layer], group: Group, target: int | None, options: MergeOptions
) -> str | None:
    """Why `target`, not the kept image, cannot receive the data; None if it can.

    Args:
        target: a layer index; None for a copy.
    """
    kept = layers[group.kept]
    if options.bitmaps == "refuse":
        if has_bitmaps(kept):
            return f"{kept.path.name} has bitmaps, which this way would lose; {_FLAGS}"
        return None
    try:
        histories = _histories(layers, group)
    except ImageError:
        return None  # refused anyway
    if options.bitmaps == "drop" or not any(each.valid for each in histories.values()):
        return None
    if target is None:
        return "a copy carries no bitmaps; use another --strategy, or --bitmaps drop"
    layer = layers[target]
    name = layer.path.name
    if not isinstance(layer, Qcow2Layer):
        return f"{name} is {layer.format}, which holds no bitmaps; {_FLAGS}"
    if layer.version < 3:
        return (
            f"{name} has compat 0.10, which holds no bitmaps; 'qemu-img amend -o compat=1.1' first"
        )
    lowest = layers[group.members[-1]].backing
    final = {"kept": kept, "lowest": layers[group.owned[-1]], "target": layer}[options.names]
    relative = lowest is not None and not lowest.name.startswith("/")
    if group.below is not None and relative and _apart(final.path, layer.path):
        # Its header is written once more after the switch. Killed within, qemu leaves the
        # bitmaps in use, and a guest may have run before anybody mends that.
        return (
            f"it lies in another directory than {final.path.name}, and moved there with its "
            "bitmaps it would need a new relative backing name; record an absolute one first"
        )
    return None


def _apart(a: Path, b: Path) -> bool:
    return a.absolute().parent != b.absolute().parent
