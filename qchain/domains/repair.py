"""Find out what merges by hand have made false in the records, and what they should say.

    v <- v.1 <- v.2*  S1 state v, S2 state v.1, and by hand:

    qemu-img commit v.1   v*  <- v.2     v reads as v.1 did: it is S2's state now, S1's is lost
    qemu-img rebase v.2   v <- v.2*      v is as it was: S1's state; S2's is lost

The files alone look the same afterwards. What tells them apart is when v was written to: a state
is never touched after its snapshot was taken, and a commit does that.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qchain.chain.gate import Gate
from qchain.domains.apply import Records, records_of
from qchain.domains.checks import domain_refusals
from qchain.domains.connection import Host
from qchain.domains.edit import (
    Place,
    clear_deleting,
    with_format,
    with_overlay,
    with_parent,
    with_source,
)
from qchain.domains.files import Files, files_of
from qchain.domains.inventory import Inventory, rebuilt
from qchain.domains.journal import Job
from qchain.domains.records import Snapshot, real
from qchain.domains.truth import Problem, above_in, nearest_below, problems_of

__all__ = ["Repair", "plan_repair"]

_ROUNDS = 200


@dataclass(frozen=True)
class Repair:
    """What would be mended, in words, and what cannot be (`left`)."""

    inventory: Inventory
    job: Job
    mends: tuple[str, ...]
    left: tuple[Problem, ...]
    refusals: tuple[str, ...] = ()


@dataclass
class _Draft:
    """Records while they are mended."""

    domain: str
    snapshots: dict[str, str]
    current: str | None

    def forget(self, inventory: Inventory, name: str) -> None:
        """A snapshot whose state is lost: its record goes, its children move up."""
        parent = inventory.snapshots[name].parent
        above = parent if parent in self.snapshots else None
        del self.snapshots[name]
        for each in inventory.children(name):
            if each.name in self.snapshots:
                self.snapshots[each.name] = with_parent(self.snapshots[each.name], above)
        if self.current == name:
            self.current = above


def plan_repair(host: Host, inventory: Inventory, gate: Gate) -> Repair:
    """Plan to make the records of a shut-off domain true. Files are never changed."""
    known = records_of(inventory)
    job = Job(
        secrets.token_hex(3), host.uri, inventory.name, inventory.uuid, "repair", known, known
    )
    refusals = domain_refusals(inventory, f"virsh shutdown {inventory.name}")
    if refusals:
        return Repair(inventory, job, (), (), tuple(refusals))
    mends: list[str] = []
    now, left = inventory, []
    for _ in range(_ROUNDS):
        files = _files(now, gate)
        left = problems_of(now, files)
        draft = _Draft(
            now.xml, {name: each.xml for name, each in now.snapshots.items()}, now.current
        )
        said = next((text for each in left if (text := _mend(each, now, files, draft))), None)
        if said is None:
            break
        mends.append(said)
        records = Records(draft.domain, draft.snapshots, draft.current)
        now = rebuilt(now, records.domain, records.snapshots, records.current, host.volume_path)
    files = _files(now, gate)
    places = sorted({place for each in files.values() for place in each.places()})
    job = replace(
        job,
        after=records_of(now),
        allow=tuple(places),
        home=places[0] if places else Path("/var/lib/libvirt/images"),
    )
    return Repair(inventory, job, tuple(mends), tuple(left))


def _files(inventory: Inventory, gate: Gate) -> dict[str, Files]:
    return {
        target: files_of(inventory, target, gate)
        for target, disk in inventory.disks.items()
        if disk.source.path is not None
    }


def _mend(
    problem: Problem, inventory: Inventory, files: Mapping[str, Files], draft: _Draft
) -> str | None:
    """Change `draft` so that the problem is gone; returns it in words, None where that is not
    possible."""
    target, name = problem.target, problem.snapshot
    images = files[target]
    match problem.kind:
        case "missing-live":
            return _missing_live(inventory, files, draft)
        case "missing-state":
            assert name is not None
            return _missing_state(inventory, target, inventory.snapshots[name], images, draft)
        case "format":
            return _wrong_format(problem, inventory, images, draft)
        case "deleting":
            assert name is not None
            draft.snapshots[name] = clear_deleting(draft.snapshots[name], target)
            return (
                f"snapshot {name}, {target}: the mark of a deletion that stopped goes; its state "
                "may have been written to: delete the snapshot, or compare it with a backup"
            )
        case "overlay" | "missing-overlay":
            assert name is not None
            state = inventory.snapshots[name].keeps(target)
            line = images.line(inventory.disks[target].source.path)
            above = None if state is None else above_in(line, state)
            if above is None:
                return None
            place = Place(images.images[above].path, images.images[above].format)
            draft.snapshots[name] = with_overlay(draft.snapshots[name], target, place)
            return f"snapshot {name}, {target}: its overlay is {place.path}"
        case "parent":
            assert name is not None
            parent = nearest_below(inventory, target, inventory.snapshots[name], images)
            if parent == inventory.snapshots[name].parent:
                return None
            draft.snapshots[name] = with_parent(draft.snapshots[name], parent)
            return f"snapshot {name}: its parent is {parent or 'none'}"
        case "current":
            draft.current = name
            return f"snapshot {name}: it is the current one"
        case "backing-store":
            chain = inventory.disks[target].chain or ()
            missing = [each.path for each in chain if each.path and not Path(each.path).exists()]
            source = inventory.disks[target].source
            if not missing or source.path is None:
                return None
            place = Place(source.path, source.format or "raw")
            draft.domain = with_source(draft.domain, target, place)
            return f"{target}: its <backingStore>, which names {missing[0]}, goes"
    return None


def _written_since(path: str, created: int) -> bool:
    """Whether a file was written to after the second in which a snapshot was taken."""
    return Path(path).stat().st_mtime >= created + 1


def _missing_live(inventory: Inventory, files: Mapping[str, Files], draft: _Draft) -> str | None:
    """The live images were committed by hand into those below, and removed."""
    current = inventory.snapshots.get(inventory.current or "")
    said = []
    for target, disk in inventory.disks.items():
        live = disk.source.path
        if current is None or live is None or Path(live).exists():
            continue
        state, overlay = current.keeps(target), current.overlays.get(target)
        named = None if overlay is None or overlay.source is None else overlay.source.path
        if state is None or named is None or real(named) != real(live):
            return None
        image = files[target].images.get(real(state))
        if image is None or not _written_since(state, current.created):
            return None
        draft.domain = with_source(draft.domain, target, Place(image.path, image.format))
        said.append(f"{live} was committed into {state}, which is live")
    if not said or current is None:
        return None
    draft.forget(inventory, current.name)
    return f"{'; '.join(said)}; snapshot {current.name}, whose state that was, is lost and goes"


def _missing_state(
    inventory: Inventory, target: str, snapshot: Snapshot, files: Files, draft: _Draft
) -> str | None:
    """A state was merged by hand: into the image below it, or into the one above."""
    lost = snapshot.keeps(target)
    assert lost is not None
    if Path(lost).exists():
        return None  # there, but not readable: nobody knows
    overlay = snapshot.reverted.get(target, snapshot.overlays[target])
    above = None if overlay.source is None else overlay.source.path
    below = None
    if above is not None and real(above) in files.images:
        below = files.images[real(above)].below
    if below is not None:
        holder = next(
            (
                each
                for each in inventory.snapshots.values()
                if each is not snapshot and real(each.keeps(target) or "/") == below
            ),
            None,
        )
        image = files.images[below]
        if _written_since(image.path, (holder or snapshot).created):
            place = Place(image.path, image.format)
            text = draft.snapshots[snapshot.name]
            for part in ("domain", "inactiveDomain"):
                text = with_source(text, target, place, (part,))
            draft.snapshots[snapshot.name] = text
            said = f"snapshot {snapshot.name}, {target}: {lost} was committed into {image.path}, "
            if holder is None:
                return said + "which is its state"
            draft.forget(inventory, holder.name)
            return said + f"which is its state; {holder.name}, whose state that was, is lost, goes"
    draft.forget(inventory, snapshot.name)
    return f"snapshot {snapshot.name}: its state {lost} is lost, its record goes"


def _wrong_format(
    problem: Problem, inventory: Inventory, files: Files, draft: _Draft
) -> str | None:
    target, name = problem.target, problem.snapshot
    if name is None:
        path = inventory.disks[target].source.path
        assert path is not None
        fmt = files.images[real(path)].format
        draft.domain = with_format(draft.domain, target, fmt, "domain")
        return f"{target}: {path} is {fmt}"
    snapshot = inventory.snapshots[name]
    state = snapshot.states[target].source
    overlay = snapshot.reverted.get(target, snapshot.overlays[target]).source
    for source, where in ((state, "state"), (overlay, "overlay")):
        if source is None or source.path is None or real(source.path) not in files.images:
            continue
        fmt = files.images[real(source.path)].format
        if source.format not in (fmt, None):
            draft.snapshots[name] = with_format(draft.snapshots[name], target, fmt, where)
            return f"snapshot {name}, {target}: its {where} {source.path} is {fmt}"
    return None
