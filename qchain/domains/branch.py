"""Plan a new branch or a longer one: revert to a snapshot, take a snapshot. Only overlays are new.

revert to S1                                  take S2, or (T15) with the live name kept

v <- v.1 <- v.2*     S1 state v, S2 v.1       v <- v.1*          v <- v.1*
v <- v.1 <- v.2      abandoned                v <- v.1 <- v.2*   v <- v.2 <- v.1*
v <- new*            overlay of S1

For the current snapshot and its ancestors the overlay is always the image of the live chain
right above the state: no version of libvirt then takes a file of another branch for the live
one's when it deletes or reverts later.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qchain.chain.gate import Gate
from qchain.chain.scan import identity
from qchain.domains.apply import Records, records_of
from qchain.domains.checks import domain_refusals, record_refusals, use_refusals
from qchain.domains.connection import Host
from qchain.domains.edit import Place, with_overlay, with_source
from qchain.domains.files import Files, all_files
from qchain.domains.inventory import Inventory, pool_directories
from qchain.domains.journal import Gone, Job, Make
from qchain.domains.records import Snapshot, real
from qchain.domains.xmltext import child, children, new_element, parse, set_text, to_text
from qchain.errors import Refused, UsageError
from qchain.plan.options import MergeOptions

__all__ = ["Branch", "plan_revert", "plan_snapshot"]


@dataclass(frozen=True)
class Branch:
    """What would be done, and why it would not.

    `left`: files that hold no snapshot's state, and are live no more.
    """

    inventory: Inventory
    job: Job
    refusals: tuple[str, ...]
    left: tuple[Path, ...] = ()


def _empty(host: Host, inventory: Inventory, words: str) -> Job:
    known = records_of(inventory)
    token = secrets.token_hex(3)
    return Job(token, host.uri, inventory.name, inventory.uuid, words, known, known)


def free_name(directory: Path, name: str) -> Path:
    """A name in the directory that nothing has: `name`, else with a number."""
    number = 1
    while True:
        path = directory / (name if number == 1 else f"{name}-{number}")
        if not path.exists() and not path.is_symlink():
            return path
        number += 1


# --- revert ------------------------------------------------------------------------


def plan_revert(
    host: Host, inventory: Inventory, name: str, gate: Gate, *, discard: bool = False
) -> Branch:
    """Plan to go back to a snapshot: its states stay, the guest gets new overlays over them.

    Args:
        discard: delete what only the abandoned branch needed.

    Raises: `UsageError` when there is no such snapshot.
    """
    snapshot = inventory.snapshots.get(name)
    if snapshot is None:
        known = ", ".join(list(inventory.snapshots)[:8]) or "none"
        raise UsageError(name, f"is no snapshot of {inventory.name}", f"its snapshots are: {known}")
    empty = _empty(host, inventory, f"revert to {name}")
    live = f"virsh destroy {inventory.name}"
    refusals = domain_refusals(inventory, live)
    refusals += _snapshot_refusals(inventory, snapshot)
    if refusals:
        return Branch(inventory, empty, tuple(refusals))
    files = all_files(inventory, gate)
    refusals = record_refusals(inventory, files)
    if refusals:
        return Branch(inventory, empty, tuple(refusals))
    make, places = [], {}
    for target in files:
        state = snapshot.keeps(target)
        if state is not None:
            below = Path(state)
            if below.is_block_device():
                refusals.append(_on_device(target, below))
                continue
            path = free_name(below.parent, f"{_stem(below)}.revert-{_plain(name)}")
            image = files[target].images[real(state)]
            make.append(Make(path, below, image.format))
            places[target] = Place(str(path), "qcow2")
    if refusals:
        return Branch(inventory, empty, tuple(refusals))
    after = Records(
        _definition(inventory, snapshot, places),
        _following(inventory, snapshot, files, places),
        name,
    )
    abandoned = {
        target: _abandoned(inventory, target, files[target], snapshot) for target in places
    }
    gone = [Path(files[t].images[each].path) for t, names in abandoned.items() for each in names]
    job = replace(
        empty,
        after=after,
        make=tuple(make),
        gone=tuple(_gone(path) for path in gone) if discard else (),
        options=MergeOptions(scan=tuple(pool_directories(host))),
        allow=tuple(sorted({place for each in files.values() for place in each.places()})),
        home=make[0].path.parent,
    )
    refusals = use_refusals(host, inventory, {real(str(each.path)) for each in job.gone})
    return Branch(inventory, job, tuple(refusals), () if discard else tuple(gone))


def _snapshot_refusals(inventory: Inventory, snapshot: Snapshot) -> list[str]:
    name, out = snapshot.name, []
    if snapshot.internal:
        out.append(
            f"{name}: is an internal snapshot; 'virsh snapshot-revert {inventory.name} {name}'"
        )
    elif snapshot.memory is not None:
        out.append(
            f"{name}: holds the guest's RAM in {snapshot.memory}; going back to a running guest "
            f"is libvirt's: 'virsh snapshot-revert {inventory.name} {name}' (9.9 and later)"
        )
    elif not any(snapshot.keeps(target) for target in inventory.disks):
        out.append(f"{name}: holds the state of none of the present disks; look at it with 'show'")
    for target in snapshot.states:
        if snapshot.keeps(target) is not None and target not in inventory.disks:
            out.append(
                f"{name}: holds a disk {target}, which the guest no longer has; attach it again"
            )
    return out


def _definition(inventory: Inventory, snapshot: Snapshot, places: Mapping[str, Place]) -> str:
    """The guest as the snapshot knows it, on the new overlays; other disks as they are now."""
    root = parse(snapshot.xml)
    inactive = child(root, "inactiveDomain")
    known = inactive if inactive is not None else child(root, "domain")
    if known is None:
        xml = inventory.xml
    else:
        known.tagName = known.nodeName = "domain"
        if known.hasAttribute("id"):
            known.removeAttribute("id")
        # Prefixes that are declared further up go along.
        for key, value in root.attributes.items():
            if key.startswith("xmlns"):
                known.setAttribute(key, value)
        xml = to_text(known)
    for target in snapshot.states:
        disk = inventory.disks.get(target)
        if target in places:
            xml = with_source(xml, target, places[target])
        elif disk is not None and disk.source.path is not None:
            xml = with_source(xml, target, Place(disk.source.path, disk.source.format or "raw"))
    return xml


def _following(
    inventory: Inventory,
    snapshot: Snapshot,
    files: Mapping[str, Files],
    places: Mapping[str, Place],
) -> dict[str, str]:
    """All records, those of `snapshot` and its ancestors on the branch that is live now."""
    records = {name: each.xml for name, each in inventory.snapshots.items()}
    for each in inventory.line(snapshot.name):
        for target, place in places.items():
            state = each.keeps(target)
            top = snapshot.keeps(target)
            if state is None or top is None:
                continue
            line = files[target].line(top)
            if each.name == snapshot.name:
                records[each.name] = with_overlay(records[each.name], target, place)
            elif real(state) in line[1:]:
                image = files[target].images[line[line.index(real(state)) - 1]]
                upper = Place(image.path, image.format)
                records[each.name] = with_overlay(records[each.name], target, upper)
    return records


def _on_device(target: str, path: Path) -> str:
    return (
        f"{target}: {path} is a block device, beside which no overlay can lie; naming another "
        "directory comes with a later version"
    )


def _abandoned(inventory: Inventory, target: str, files: Files, snapshot: Snapshot) -> list[str]:
    """Images that nothing needs once the live one is left, the uppermost first.

    Among them those of earlier branches that only the overlays of `snapshot` and its ancestors
    name, which are to be others.
    """
    needed: set[str] = set()
    for each in inventory.snapshots.values():
        needed.update(files.line(each.keeps(target)))
    tops = [inventory.disks[target].source.path]
    for each in inventory.line(snapshot.name):
        overlay = each.reverted.get(target, each.overlays.get(target))
        tops += [] if overlay is None or overlay.source is None else [overlay.source.path]
    out: list[str] = []
    for top in tops:
        for name in files.line(top):
            if name in needed or name in out or _shared(files, name):
                break
            out.append(name)
    return out


def _shared(files: Files, name: str) -> bool:
    return sum(1 for image in files.images.values() if image.below == name) > 1


def _gone(path: Path) -> Gone:
    known = identity(path)
    if known is None or path.is_symlink():
        raise Refused(path, "is a symbolic link or gone", "name the file itself in the records")
    return Gone(path, known)


# --- snapshot ----------------------------------------------------------------------


def plan_snapshot(
    host: Host,
    inventory: Inventory,
    name: str,
    gate: Gate,
    *,
    description: str = "",
    keep_active_name: bool = False,
) -> Branch:
    """Plan an external snapshot of all disks.

    Args:
        keep_active_name: the new overlays take the live names, the present images become
            STEM.NAME (row T15).

    Raises: `UsageError` for a name that cannot be one.
    """
    if not name or "/" in name or not name.isprintable():
        raise UsageError(name or "NAME", "is no name for a snapshot", "use letters and digits")
    empty = _empty(host, inventory, f"snapshot {name}")
    live = f"virsh snapshot-create-as {inventory.name} {name} --disk-only"
    refusals = domain_refusals(inventory, live)
    if name in inventory.snapshots:
        refusals.append(f"{name}: is a snapshot of {inventory.name} already; choose another name")
    if refusals:
        return Branch(inventory, empty, tuple(refusals))
    files = all_files(inventory, gate)
    refusals = record_refusals(inventory, files)
    if all(inventory.disks[target].excluded for target in files):
        refusals.append(f"{inventory.name}: has no disk that a snapshot could be taken of")
    if refusals:
        return Branch(inventory, empty, tuple(refusals))
    make, states, overlays = [], {}, {}
    for target, disk in inventory.disks.items():
        if target not in files or disk.excluded:
            continue
        assert disk.source.path is not None
        path = Path(disk.source.path)
        new = path.with_name(f"{_stem(path)}.{_plain(name)}")
        image = files[target].images[real(str(path))]
        if path.is_block_device():
            refusals.append(_on_device(target, path))
            continue
        if new.exists() or new.is_symlink():
            refusals.append(f"{new}: exists already; choose another name")
        below, above = (new, path) if keep_active_name else (path, new)
        make.append(Make(above, below, image.format, keep_active_name))
        states[target] = Place(str(below), image.format)
        overlays[target] = Place(str(above), "qcow2")
    if refusals:
        return Branch(inventory, empty, tuple(refusals))
    definition = inventory.xml
    for target, place in overlays.items():
        definition = with_source(definition, target, place)
    records = {each.name: each.xml for each in inventory.snapshots.values()}
    for each in inventory.line(inventory.current):
        for target, place in states.items():
            state = each.keeps(target)
            line = files[target].line(inventory.disks[target].source.path)
            if keep_active_name and state is not None and line[1:2] == [real(state)]:
                records[each.name] = with_overlay(records[each.name], target, place)
    parent = inventory.current
    records[name] = _new_record(inventory, name, parent, description, states, overlays)
    job = replace(
        empty,
        after=Records(definition, records, name),
        make=tuple(make),
        allow=tuple(sorted({place for each in files.values() for place in each.places()})),
        home=make[0].path.parent,
    )
    return Branch(inventory, job, tuple(refusals))


def _stem(path: Path) -> str:
    """As libvirt names overlays: the name without what follows its last dot."""
    stem, dot, _ = path.name.rpartition(".")
    return stem if dot and stem else path.name


def _plain(name: str) -> str:
    """A snapshot's name as a part of a file's."""
    return "".join(each if each.isalnum() or each in "-_.+" else "_" for each in name)


def _new_record(
    inventory: Inventory,
    name: str,
    parent: str | None,
    description: str,
    states: Mapping[str, Place],
    overlays: Mapping[str, Place],
) -> str:
    """The record as libvirt itself would write it."""
    domain = inventory.xml
    for target, place in states.items():
        domain = with_source(domain, target, place)
    root = parse("<domainsnapshot/>")

    def add(into: str, text: str | None = None, **attributes: str) -> None:
        made = new_element(root, into, **attributes)
        if text is not None:
            set_text(made, text)
        root.appendChild(made)

    add("name", name)
    if description:
        add("description", description)
    add("state", "shutoff")
    if parent is not None:
        above = new_element(root, "parent")
        label = new_element(root, "name")
        set_text(label, parent)
        above.appendChild(label)
        root.appendChild(above)
    add("creationTime", str(int(time.time())))
    add("memory", snapshot="no")
    disks = new_element(root, "disks")
    for disk in children(child(parse(domain), "devices"), "disk"):
        found = child(disk, "target")
        word = "" if found is None else found.getAttribute("dev")
        if word in overlays:
            entry = new_element(root, "disk", name=word, snapshot="external", type="file")
            entry.appendChild(new_element(root, "driver", type=overlays[word].format))
            entry.appendChild(new_element(root, "source", file=overlays[word].path))
        else:
            entry = new_element(root, "disk", name=word, snapshot="no")
        disks.appendChild(entry)
    root.appendChild(disks)
    document = root.ownerDocument
    assert document is not None
    root.appendChild(document.importNode(parse(domain), True))
    return to_text(root)
