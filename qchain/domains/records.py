"""What a domain and its snapshot records say of disks: parsed, never changed here.

Snapshot Sk was taken when F(k-1) was live: its <domain> names F(k-1), the **state** that it
keeps, and its <disks> name Fk, the **overlay** that the guest wrote to from then on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from xml.dom.minidom import Element

from qchain.domains.xmltext import child, children, parse, text_at

__all__ = [
    "DomainDisk",
    "Overlay",
    "Snapshot",
    "Source",
    "Volumes",
    "disks_of",
    "files_in",
    "in_order",
    "real",
    "snapshot_of",
]

Volumes = Callable[[str, str], str | None]
"""Where a volume lies, by the names of its pool and its own."""


def real(path: str) -> str:
    """The name by which two names of one file are known to be of one."""
    return os.path.realpath(path)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a disk's data are.

    Attributes:
        kind: libvirt's type: file, block, volume, network, ...
        path: the local file or device; None where it is none.
        format: as recorded, None where it is not.
    """

    kind: str
    path: str | None
    format: str | None


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """A disk of a domain.

    Attributes:
        chain: an explicit <backingStore>, None where libvirt probes. An empty one ends the
            chain: its last source has kind "".
        excluded: snapshots leave it out (read-only, or snapshot='no').
    """

    target: str
    device: str
    source: Source
    chain: tuple[Source, ...] | None = None
    excluded: bool = False


@dataclass(frozen=True, slots=True)
class Overlay:
    """A disk in a snapshot's <disks>. `mode`: external, internal, no or manual."""

    target: str
    mode: str
    source: Source | None
    deleting: bool = False


@dataclass(frozen=True)
class Snapshot:
    """A snapshot's record.

    Attributes:
        states: the disks of its <domain>, as they were.
        overlays: the disks of its <disks>.
        reverted: those of <revertDisks> (libvirt 9.9 and later).
        memory: the file that holds the guest's RAM, None for a disk-only one.
    """

    name: str
    parent: str | None
    created: int
    state: str
    description: str
    xml: str
    states: Mapping[str, DomainDisk]
    overlays: Mapping[str, Overlay]
    reverted: Mapping[str, Overlay]
    memory: str | None = None

    def keeps(self, target: str) -> str | None:
        """The file that holds this snapshot's state of a disk; None where it has none of it."""
        overlay, state = self.overlays.get(target), self.states.get(target)
        if overlay is None or overlay.mode != "external" or state is None:
            return None
        return state.source.path

    @property
    def internal(self) -> bool:
        return any(each.mode == "internal" for each in self.overlays.values())


def disks_of(domain: Element, volumes: Volumes) -> dict[str, DomainDisk]:
    """The disks of a <domain> that hold data, by target; CD-ROMs and floppies are none of these."""
    out = {}
    for disk in children(child(domain, "devices"), "disk"):
        device = disk.getAttribute("device") or "disk"
        target = child(disk, "target")
        if target is None or device not in ("disk", "lun"):
            continue
        name = target.getAttribute("dev")
        excluded = disk.getAttribute("snapshot") == "no" or child(disk, "readonly") is not None
        source, chain = _source(disk, volumes), _explicit(disk, volumes)
        out[name] = DomainDisk(name, device, source, chain, excluded)
    return out


def _source(node: Element, volumes: Volumes) -> Source:
    kind = node.getAttribute("type")
    driver = child(node, "driver") or child(node, "format")
    fmt = None if driver is None else driver.getAttribute("type") or None
    source = child(node, "source")
    if source is None:
        return Source(kind, None, fmt)
    path = None
    if kind == "file":
        path = source.getAttribute("file") or None
    elif kind == "block":
        path = source.getAttribute("dev") or None
    elif kind == "volume":
        path = volumes(source.getAttribute("pool"), source.getAttribute("volume"))
    return Source(kind, path, fmt)


def _explicit(disk: Element, volumes: Volumes) -> tuple[Source, ...] | None:
    store = child(disk, "backingStore")
    if store is None:
        return None
    out = []
    while store is not None:
        if not store.getAttribute("type"):
            out.append(Source("", None, None))
            break
        out.append(_source(store, volumes))
        store = child(store, "backingStore")
    return tuple(out)


def snapshot_of(xml: str, volumes: Volumes) -> Snapshot:
    """A record, from its full XML."""
    root = parse(xml)
    domain, memory = child(root, "domain"), child(root, "memory")
    created = text_at(root, "creationTime")
    return Snapshot(
        name=text_at(root, "name"),
        parent=text_at(root, "parent", "name") or None,
        created=int(created) if created.isdecimal() else 0,
        state=text_at(root, "state"),
        description=text_at(root, "description"),
        xml=xml,
        states={} if domain is None else disks_of(domain, volumes),
        overlays=_overlays(child(root, "disks"), volumes),
        reverted=_overlays(child(root, "revertDisks"), volumes),
        memory=None if memory is None else memory.getAttribute("file") or None,
    )


def _overlays(disks: Element | None, volumes: Volumes) -> dict[str, Overlay]:
    out = {}
    for disk in children(disks, "disk"):
        name, mode = disk.getAttribute("name"), disk.getAttribute("snapshot") or "external"
        source = _source(disk, volumes) if child(disk, "source") is not None else None
        deleting = child(disk, "snapshotDeleteInProgress") is not None
        out[name] = Overlay(name, mode, source, deleting)
    return out


def in_order(snapshots: Iterable[Snapshot]) -> dict[str, Snapshot]:
    """Parents before children, older ones first; what has lost its parent is a root."""
    waiting = {each.name: each for each in sorted(snapshots, key=lambda s: (s.created, s.name))}
    below: dict[str | None, list[Snapshot]] = {}
    for each in waiting.values():
        below.setdefault(each.parent if each.parent in waiting else None, []).append(each)
    out: dict[str, Snapshot] = {}
    stack = below.get(None, [])[::-1]
    while stack:
        each = stack.pop()
        out[each.name] = each
        stack += below.get(each.name, [])[::-1]
    # Records that are each other's parents: libvirt refuses them, and here they are not lost.
    return out | {name: each for name, each in waiting.items() if name not in out}


def files_in(xml: str, volumes: Volumes) -> set[str]:
    """Every local file that a domain or snapshot XML names anywhere, by real name."""
    found = set()
    stack = [parse(xml)]
    while stack:
        node = stack.pop()
        stack += [each for each in node.childNodes if isinstance(each, Element)]
        for attribute in ("file", "dev"):
            name = node.getAttribute(attribute)
            if name.startswith("/"):
                found.add(real(name))
        if node.tagName == "source" and node.getAttribute("pool"):
            path = volumes(node.getAttribute("pool"), node.getAttribute("volume"))
            if path is not None:
                found.add(real(path))
    return found
