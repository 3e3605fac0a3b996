"""Everything about one domain before anything is done to it, and who else uses what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qchain.domains.connection import Host, told
from qchain.domains.records import (
    DomainDisk,
    Snapshot,
    Volumes,
    disks_of,
    files_in,
    in_order,
    real,
    snapshot_of,
)
from qchain.domains.xmltext import child, parse, text_at

__all__ = ["Inventory", "Use", "look", "others", "pool_directories", "rebuilt"]


@dataclass(frozen=True)
class Inventory:
    """A domain: its definition as the next start takes it, and its snapshots, parents first."""

    handle: Any
    name: str
    uuid: str
    active: bool
    persistent: bool
    managed_save: bool
    xml: str
    disks: Mapping[str, DomainDisk]
    snapshots: Mapping[str, Snapshot]
    current: str | None
    checkpoints: tuple[str, ...] = ()

    def children(self, name: str | None) -> list[Snapshot]:
        """The snapshots directly below one; below None those without a parent."""
        return [
            each
            for each in self.snapshots.values()
            if (each.parent if each.parent in self.snapshots else None) == name
        ]

    def line(self, name: str | None) -> list[Snapshot]:
        """A snapshot and its ancestors, itself first."""
        out: list[Snapshot] = []
        while name is not None and name in self.snapshots and len(out) <= len(self.snapshots):
            out.append(self.snapshots[name])
            name = self.snapshots[name].parent
        return out


@dataclass(frozen=True, slots=True)
class Use:
    """A file that somebody else's record names: `who`, in words."""

    path: str
    who: str


def look(host: Host, name: str) -> Inventory:
    """Read a domain. Raises: `UsageError` when there is none, `LibvirtError`."""
    return _read(host, host.domain(name))


def _read(host: Host, handle: Any) -> Inventory:
    with told(str(handle.name())):
        name, uuid = str(handle.name()), str(handle.UUIDString())
        active, persistent = bool(handle.isActive()), bool(handle.isPersistent())
        saved = bool(handle.hasManagedSaveImage(0))
    xml = host.domain_xml(handle)
    texts, current = host.snapshots_xml(handle)
    found = in_order(snapshot_of(text, host.volume_path) for text in texts.values())
    return Inventory(
        handle,
        name,
        uuid,
        active,
        persistent,
        saved,
        xml,
        disks_of(parse(xml), host.volume_path),
        found,
        current,
        tuple(host.checkpoints(handle)),
    )


def rebuilt(
    inventory: Inventory,
    xml: str,
    snapshots: Mapping[str, str],
    current: str | None,
    volumes: Volumes,
) -> Inventory:
    """The same domain with other records."""
    found = in_order(snapshot_of(text, volumes) for text in snapshots.values())
    disks = disks_of(parse(xml), volumes)
    return replace(inventory, xml=xml, disks=disks, snapshots=found, current=current)


def others(host: Host, uuid: str) -> list[Use]:
    """What all other domains of the host use: definitions, running ones, snapshot records."""
    out: list[Use] = []
    for handle in host.domains():
        with told(host.uri):
            name, other = str(handle.name()), str(handle.UUIDString())
        if other == uuid:
            continue
        texts = [(host.domain_xml(handle), f"domain {name}")]
        if handle.isActive():
            texts.append((host.domain_xml(handle, inactive=False), f"domain {name}"))
        records, _ = host.snapshots_xml(handle)
        texts += [(xml, f"snapshot {snap} of domain {name}") for snap, xml in records.items()]
        for xml, who in texts:
            out += [Use(path, who) for path in sorted(files_in(xml, host.volume_path))]
    return out


def pool_directories(host: Host) -> list[Path]:
    """The directories of the host's active pools: other overlays may lie there."""
    out = []
    for pool in host.pools():
        with told(host.uri):
            place = text_at(child(parse(str(pool.XMLDesc(0))), "target"), "path")
        if place and Path(place).is_dir():
            out.append(Path(real(place)))
    return out
