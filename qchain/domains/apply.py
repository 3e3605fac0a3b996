"""Bring libvirt's records to what they are to say: in an order in which each is true.

1. survivors, parents first: re-parented and re-pointed while all that goes is still there.
   A snapshot without children may then go without libvirt changing anybody else's record
   (9.0 changes those of descendants as if it had committed).
2. the definition of the domain
3. what goes, children first; the current snapshot has been named before
4. all of it read back and compared
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qchain.domains.connection import Host, told
from qchain.domains.inventory import Inventory
from qchain.domains.records import in_order, snapshot_of
from qchain.domains.xmltext import same
from qchain.errors import FailedMidway, Refused

__all__ = ["Records", "bring", "handle_of", "records_of", "require_known", "require_unchanged"]

Before = Callable[[str], None]
"""Called before each change, with words for it: tests stop there."""


@dataclass(frozen=True)
class Records:
    """A definition, and the snapshots' full records by name, parents first."""

    domain: str
    snapshots: Mapping[str, str]
    current: str | None


def records_of(inventory: Inventory) -> Records:
    """The records as they are."""
    found = {name: each.xml for name, each in inventory.snapshots.items()}
    return Records(inventory.xml, found, inventory.current)


def handle_of(host: Host, uuid: str, name: str) -> Any:
    """The domain. Raises `Refused` when it is not there any more."""
    try:
        return host.connection.lookupByUUIDString(uuid)
    except host.libvirt.libvirtError:
        raise Refused(name, f"no domain of {host.uri} has its UUID {uuid}", "define it") from None


def require_unchanged(host: Host, handle: Any, old: Records) -> None:
    """Raise `Refused` unless the records are those that the change was planned for.

    Between plan and change a person may think for an hour.
    """
    present, current = host.snapshots_xml(handle)
    alike = (
        present.keys() == old.snapshots.keys()
        and current == old.current
        and all(same(xml, old.snapshots[name]) for name, xml in present.items())
        and same(host.domain_xml(handle), old.domain)
    )
    if not alike:
        raise Refused(str(handle.name()), "has changed since it was planned", "do it again")


def require_known(host: Host, handle: Any, old: Records, goal: Records) -> None:
    """Raise `Refused` where somebody has changed the records otherwise since the change began."""
    name = str(handle.name())
    present, _ = host.snapshots_xml(handle)
    for snapshot in present.keys() - old.snapshots.keys() - goal.snapshots.keys():
        raise Refused(
            f"{name}: snapshot {snapshot}",
            "was taken after the change had stopped, and is not known to it",
            f"delete its record first: 'virsh snapshot-delete {name} {snapshot} --metadata'",
        )
    definition = host.domain_xml(handle)
    alike = same(old.domain, goal.domain)
    if not alike and not same(definition, old.domain) and not same(definition, goal.domain):
        raise Refused(
            name,
            "its definition was changed after the change had stopped",
            "undo that with 'virsh edit', and do it again afterwards",
        )


def bring(
    host: Host, handle: Any, old: Records, goal: Records, before: Before | None = None
) -> None:
    """Make the records, which said what `old` says, say what `goal` says.

    May be stopped, and repeated. What the two do not differ in is left as it is.

    Raises: `Refused` when the guest runs; `FailedMidway` when libvirt does not do it.
    """
    libvirt, name = host.libvirt, str(handle.name())
    say = before or (lambda _: None)
    redefine = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    current_too = redefine | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
    present, current = host.snapshots_xml(handle)
    for snapshot, xml in goal.snapshots.items():
        becomes = snapshot == goal.current
        as_it_is = snapshot in present and same(present[snapshot], xml)
        if not as_it_is or (becomes and current != snapshot):
            say(f"redefine {snapshot}")
            host.require_off(handle)
            with told(f"{name}: snapshot {snapshot}", changing=True):
                handle.snapshotCreateXML(xml, current_too if becomes else redefine)
    defines = not same(old.domain, goal.domain)
    if defines and not same(host.domain_xml(handle), goal.domain):
        say("define")
        host.require_off(handle)
        with told(name, changing=True):
            host.connection.defineXMLFlags(goal.domain, 0)
    metadata = libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY
    left, _ = host.snapshots_xml(handle)
    for snapshot in [*in_order(snapshot_of(xml, host.volume_path) for xml in left.values())][::-1]:
        if snapshot in old.snapshots and snapshot not in goal.snapshots:
            say(f"delete {snapshot}")
            host.require_off(handle)
            with told(f"{name}: snapshot {snapshot}", changing=True):
                handle.snapshotLookupByName(snapshot, 0).delete(metadata)
    _read_back(host, handle, goal, defines)


def _read_back(host: Host, handle: Any, goal: Records, defines: bool) -> None:
    """Raise `FailedMidway` unless libvirt says what it was told."""
    name = str(handle.name())
    found, current = host.snapshots_xml(handle)
    wrong = [
        f"snapshot {each}"
        for each in {*found, *goal.snapshots}
        if each not in found
        or each not in goal.snapshots
        or not same(found[each], goal.snapshots[each])
    ]
    if current != goal.current:
        wrong.append(f"current snapshot ({current}, not {goal.current})")
    if defines and not same(host.domain_xml(handle), goal.domain):
        wrong.append("definition")
    if wrong:
        raise FailedMidway(name, f"libvirt gives the {sorted(wrong)[0]} back changed")
