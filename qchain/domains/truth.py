"""Do the records say what is so? What they should say follows from the files' headers.

    base <- one <- two*          state(S1) = base, overlay(S1) = one
      S1      S2                 state(S2) = one,  overlay(S2) = two, the live image

For the current snapshot and all its ancestors the overlay is the image of the live chain
right above the state: then whatever libvirt deletes or reverts later, it takes the live
branch for what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qchain.domains.files import Files
from qchain.domains.inventory import Inventory
from qchain.domains.records import DomainDisk, Snapshot, Source, real

__all__ = ["Problem", "above_in", "nearest_below", "problems_of"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that a record says and that is not so.

    Attributes:
        kind: missing-live, missing-state, missing-overlay, format, overlay, off-chain, parent,
            deleting, current, backing-store.
        snapshot: whose record; None for the definition of the domain.
    """

    kind: str
    target: str
    snapshot: str | None
    text: str


def above_in(line: list[str], name: str) -> str | None:
    """The image of a chain (active first) right above another one; None where there is none."""
    at = line.index(real(name)) if real(name) in line else 0
    return line[at - 1] if at > 0 else None


def problems_of(inventory: Inventory, files: Mapping[str, Files]) -> list[Problem]:
    """What is out of step. `files`: those of each disk, by target."""
    out: list[Problem] = []
    for target, disk in inventory.disks.items():
        if disk.source.path is not None:
            out += _of_disk(inventory, target, disk, files[target])
    return out


def _of_disk(inventory: Inventory, target: str, disk: DomainDisk, files: Files) -> list[Problem]:
    assert disk.source.path is not None
    out: list[Problem] = []
    live = disk.source.path
    if real(live) not in files.images:
        why = _why(files, live)
        return [Problem("missing-live", target, None, f"{live} cannot be opened: {why}")]
    out += _format(files, target, None, disk.source)
    line = files.line(live)
    if disk.chain is not None:
        said = [real(each.path) if each.path else "" for each in disk.chain]
        if said != [*line[1:], ""] and said != line[1:]:
            text = f"its <backingStore> is not what the headers of {live} and below say"
            out.append(Problem("backing-store", target, None, text))
    active = {each.name for each in inventory.line(inventory.current)}
    for snapshot in inventory.snapshots.values():
        if snapshot.keeps(target) is not None:
            out += _of_record(inventory, target, snapshot, files, line, snapshot.name in active)
    holders = [
        each.name
        for each in inventory.snapshots.values()
        if _is(each, target, real(live)) and each.keeps(target) is not None
    ]
    if holders and inventory.current not in holders and inventory.current is None:
        text = f"no snapshot is current, and {live} is the overlay of {holders[0]}"
        out.append(Problem("current", target, holders[0], text))
    return out


def _is(snapshot: Snapshot, target: str, name: str) -> bool:
    overlay = snapshot.overlays.get(target)
    return (
        overlay is not None
        and overlay.source is not None
        and overlay.source.path is not None
        and real(overlay.source.path) == name
    )


def _of_record(
    inventory: Inventory,
    target: str,
    snapshot: Snapshot,
    files: Files,
    line: list[str],
    active: bool,
) -> list[Problem]:
    out: list[Problem] = []
    name = snapshot.name
    state = snapshot.keeps(target)
    overlay = snapshot.overlays[target]
    assert state is not None
    mark = overlay.deleting
    # A revert by libvirt 9.9 and later leaves <disks> as they were, and names its own here.
    overlay = snapshot.reverted.get(target, overlay)
    if mark:
        text = "a deletion by libvirt was stopped (snapshotDeleteInProgress)"
        out.append(Problem("deleting", target, name, text))
    there = real(state) in files.images
    if not there:
        text = f"its state {state} cannot be opened: {_why(files, state)}"
        out.append(Problem("missing-state", target, name, text))
    else:
        out += _format(files, target, name, snapshot.states[target].source)
    written = None if overlay.source is None else overlay.source.path
    if written is not None and real(written) not in files.images:
        if not active:
            # Of a branch that libvirt has left: it deletes that overlay.
            return out
        text = f"its overlay {written} cannot be opened: {_why(files, written)}"
        out.append(Problem("missing-overlay", target, name, text))
    elif written is not None:
        assert overlay.source is not None
        out += _format(files, target, name, overlay.source)
    if there and active:
        if real(state) not in line[1:]:
            text = f"its state {state} is not below the live image {line[0]}"
            out.append(Problem("off-chain", target, name, text))
        elif written is None or real(written) != above_in(line, state):
            text = f"its overlay is {written}, but above its state lies {above_in(line, state)}"
            out.append(Problem("overlay", target, name, text))
    parent = inventory.snapshots.get(snapshot.parent or "")
    if snapshot.parent is not None and parent is None:
        text = f"its parent {snapshot.parent} is no snapshot"
        out.append(Problem("parent", target, name, text))
    if parent is not None and there and parent.keeps(target) is not None:
        nearest = nearest_below(inventory, target, snapshot, files)
        known = real(parent.keeps(target) or "/") in files.images
        if known and nearest != parent.name:
            text = f"its parent is {parent.name}, but the next state below is of {nearest}"
            out.append(Problem("parent", target, name, text))
    return out


def nearest_below(
    inventory: Inventory, target: str, snapshot: Snapshot, files: Files
) -> str | None:
    """The snapshot whose state of a disk is the next one below; None where there is none."""
    states = {
        real(state): each.name
        for each in inventory.snapshots.values()
        if each is not snapshot and (state := each.keeps(target)) is not None
    }
    line = files.line(snapshot.keeps(target))[1:]
    return next((states[name] for name in line if name in states), None)


def _format(files: Files, target: str, name: str | None, source: Source) -> list[Problem]:
    assert source.path is not None
    image = files.images[real(source.path)]
    if source.format in (image.format, None):
        return []
    text = f"{source.path} is {image.format}, and the record says {source.format}"
    return [Problem("format", target, name, text)]


def _why(files: Files, name: str) -> str:
    problem = files.problems.get(real(name))
    if problem is None:
        return "it is not in the chain"
    return f"{problem.why}; {problem.todo}" if problem.todo else problem.why
