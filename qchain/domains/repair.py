"""Find out what merges by hand have made false in the records, and what they should say.

    v <- v.1 <- v.2*  S1 state v, S2 state v.1, and by hand:

    qemu-img commit v.1   v*  <- v.2     v reads as v.1 did: it is S2's state now, S1's is lost
    qemu-img rebase v.2   v <- v.2*      v is as it was: S1's state; S2's is lost

The files alone look the same afterwards. What tells them apart is when v was written to: a state
is never touched after its snapshot was taken, and a commit does that. `--merged-by` says it
where that does not decide.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qchain.chain.gate import Gate
from qchain.domains.apply import Records, records_of
from qchain.domains.checks import domain_refusals, unfinished_refusals
from qchain.domains.connection import Host
from qchain.domains.edit import (
    Place,
    clear_deleting,
    with_format,
    with_overlay,
    with_parent,
    with_source,
)
from qchain.domains.files import Files, all_files
from qchain.domains.inventory import Inventory, rebuilt
from qchain.domains.journal import Job
from qchain.domains.records import Snapshot, real
from qchain.domains.truth import Problem, above_in, nearest_below, problems_of
from qchain.errors import UsageError

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


def plan_repair(host: Host, inventory: Inventory, gate: Gate, how: str = "auto") -> Repair:
    """Plan to make the records of a shut-off domain true. Files are never changed.

    Args:
        how: the merges by hand were done: commit, pull, or auto (by the times of the files).

    Raises: `UsageError` for another word.
    """
    if how not in ("auto", "commit", "pull"):
        raise UsageError("--merged-by", f"{how!r} is not possible", "one of: auto, commit, pull")
    known = records_of(inventory)
    job = Job(
        secrets.token_hex(3), host.uri, inventory.name, inventory.uuid, "repair", known, known
    )
    refusals = domain_refusals(inventory, f"virsh shutdown {inventory.name}")
    refusals = refusals or unfinished_refusals(inventory, all_files(inventory, gate))
    if refusals:
        return Repair(inventory, job, (), (), tuple(refusals))
    mends: list[str] = []
    now, left = inventory, []
    for _ in range(_ROUNDS):
        files = all_files(now, gate)
        left = problems_of(now, files)
        draft = _Draft(
            now.xml, {name: each.xml for name, each in now.snapshots.items()}, now.current
        )
        said = next((text for each in left if (text := _mend(each, now, files, draft, how))), None)
        if said is None:
            break
        mends.append(said)
        records = Records(draft.domain, draft.snapshots, draft.current)
        now = rebuilt(now, records.domain, records.snapshots, records.current, host.volume_path)
    files = all_files(now, gate)
    places = sorted({place for each in files.values() for place in each.places()})
    job = replace(
        job,
        after=records_of(now),
        allow=tuple(places),
        home=places[0] if places else Path("/var/lib/libvirt/images"),
    )
    return Repair(inventory, job, tuple(mends), tuple(left))


def _mend(
    problem: Problem,
    inventory: Inventory,
    files: Mapping[str, Files],
    draft: _Draft,
    how: str,
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
            return _missing_state(inventory, inventory.snapshots[name], files, draft, how)
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


@dataclass(frozen=True, slots=True)
class _Lost:
    """A state that is gone from a disk, and what lies below where it was."""

    target: str
    path: str
    below: Place | None
    holder: Snapshot | None
    committed: bool


def _lost_states(
    inventory: Inventory, snapshot: Snapshot, files: Mapping[str, Files], how: str
) -> list[_Lost]:
    out = []
    for target, images in files.items():
        lost = snapshot.keeps(target)
        if lost is None or Path(lost).exists():
            continue
        overlay = snapshot.reverted.get(target, snapshot.overlays[target])
        above = None if overlay.source is None else overlay.source.path
        found = None if above is None else images.images.get(real(above))
        below = None if found is None or found.below is None else images.images[found.below]
        if below is None:
            # Nothing that it could have been committed into.
            out.append(_Lost(target, lost, None, None, False))
            continue
        holder = next(
            (
                each
                for each in inventory.snapshots.values()
                if each is not snapshot and real(each.keeps(target) or "/") == real(below.path)
            ),
            None,
        )
        written = _written_since(below.path, (holder or snapshot).created)
        place = Place(below.path, below.format)
        committed = how == "commit" or (how == "auto" and written)
        out.append(_Lost(target, lost, place, holder, committed))
    return out


def _missing_state(
    inventory: Inventory,
    snapshot: Snapshot,
    files: Mapping[str, Files],
    draft: _Draft,
    how: str,
) -> str | None:
    """A state was merged by hand: into the image below it, or into the one above.

    Where the disks do not agree nothing is mended: a commit that had nothing to write looks
    like a pull, and somebody may have done both.
    """
    lost = _lost_states(inventory, snapshot, files, how)
    if not lost or len({each.committed for each in lost}) > 1:
        return None
    names = ", ".join(each.path for each in lost)
    if not lost[0].committed:
        draft.forget(inventory, snapshot.name)
        return f"snapshot {snapshot.name}: its state ({names}) is lost, its record goes"
    text = draft.snapshots[snapshot.name]
    for each in lost:
        assert each.below is not None
        for part in ("domain", "inactiveDomain"):
            text = with_source(text, each.target, each.below, (part,))
    draft.snapshots[snapshot.name] = text
    into = ", ".join(each.below.path for each in lost if each.below is not None)
    said = f"snapshot {snapshot.name}: {names}: committed into {into}, its state now"
    for holder in {each.holder.name for each in lost if each.holder is not None}:
        draft.forget(inventory, holder)
        said += f"; that of {holder} is lost, its record goes"
    return said


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
