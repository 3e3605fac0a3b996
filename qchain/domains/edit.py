"""Changes in the XML of domains and snapshots: names of files, parents, overlays.

What is not named here stays as it is: cookies, inactive definitions, secrets, other disks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.dom.minidom import Element

from qchain.domains.records import real
from qchain.domains.xmltext import (
    child,
    children,
    drop,
    insert,
    new_element,
    parse,
    set_text,
    to_text,
)

__all__ = [
    "Place",
    "clear_deleting",
    "moved",
    "name_file",
    "with_format",
    "with_overlay",
    "with_parent",
    "with_source",
]


@dataclass(frozen=True, slots=True)
class Place:
    """A file that a record is to name, and its format."""

    path: str
    format: str


def with_parent(xml: str, parent: str | None) -> str:
    """A snapshot's record with another parent, or with none."""
    root = parse(xml)
    found = child(root, "parent")
    if found is not None and parent is None:
        drop(found)
    elif parent is not None:
        if found is None:
            found = new_element(root, "parent")
            insert(root, found, ("name", "description", "state"))
        name = child(found, "name")
        if name is None:
            name = new_element(found, "name")
            found.appendChild(name)
        set_text(name, parent)
    return to_text(root)


def with_overlay(xml: str, target: str, place: Place) -> str:
    """A snapshot's record whose overlay of a disk is another file.

    <revertDisks>, which newer versions of libvirt prefer to <disks>, loses that disk.
    """
    root = parse(xml)
    for disk in list(children(child(root, "disks"), "disk")):
        if disk.getAttribute("name") == target:
            name_file(disk, place)
    reverted = child(root, "revertDisks")
    for disk in list(children(reverted, "disk")):
        if disk.getAttribute("name") == target:
            drop(disk)
    if reverted is not None and not list(children(reverted, "disk")):
        drop(reverted)
    return to_text(root)


def with_source(xml: str, target: str, place: Place, part: tuple[str, ...] = ()) -> str:
    """A definition whose disk is another file; with `part` the one within a snapshot's record.

    An explicit <backingStore> goes: the image's own header says what it backs on.
    """
    root = parse(xml)
    top = child(root, *part) if part else root
    for disk in _domain_disks(top):
        found = child(disk, "target")
        if found is not None and found.getAttribute("dev") == target:
            name_file(disk, place)
            store = child(disk, "backingStore")
            if store is not None:
                drop(store)
    return to_text(root)


def with_format(xml: str, target: str, fmt: str, where: str) -> str:
    """A record that says another format of a disk. `where`: domain, state or overlay."""
    root = parse(xml)
    if where == "overlay":
        disks = [
            disk
            for name in ("disks", "revertDisks")
            for disk in children(child(root, name), "disk")
            if disk.getAttribute("name") == target
        ]
    else:
        tops = [root] if where == "domain" else [child(root, "domain"), child(root, _INACTIVE)]
        disks = [disk for top in tops for disk in _domain_disks(top) if _target(disk) == target]
    for disk in disks:
        _set_format(disk, fmt)
    return to_text(root)


def clear_deleting(xml: str, target: str) -> str:
    """Without the mark of a deletion that libvirt did not finish."""
    root = parse(xml)
    for disk in children(child(root, "disks"), "disk"):
        mark = child(disk, "snapshotDeleteInProgress")
        if disk.getAttribute("name") == target and mark is not None:
            drop(mark)
    return to_text(root)


def moved(xml: str, moves: Mapping[str, Place]) -> str:
    """A record in which files that are merged away are named by where their content is now.

    Args:
        moves: real names of files that go, and what takes their place. From an explicit
            chain of backing files they are taken out.
    """
    root = parse(xml)
    for disk in _all_disks(root):
        path = _path(disk)
        if path is not None and real(path) in moves:
            name_file(disk, moves[real(path)])
        _splice(disk, moves)
    return to_text(root)


_INACTIVE = "inactiveDomain"


def _all_disks(root: Element) -> Iterator[Element]:
    """Every <disk> of a definition, or of a snapshot's record."""
    if root.tagName == "domain":
        yield from _domain_disks(root)
        return
    for name in ("domain", _INACTIVE):
        yield from _domain_disks(child(root, name))
    for name in ("disks", "revertDisks"):
        yield from children(child(root, name), "disk")


def _domain_disks(domain: Element | None) -> Iterator[Element]:
    yield from children(child(domain, "devices"), "disk")


def _target(disk: Element) -> str:
    target = child(disk, "target")
    return "" if target is None else target.getAttribute("dev")


def _path(node: Element) -> str | None:
    source = child(node, "source")
    if source is None:
        return None
    return source.getAttribute("file") or source.getAttribute("dev") or None


def _splice(node: Element, moves: Mapping[str, Place]) -> None:
    """Take files that go out of the explicit chain below `node`."""
    store = child(node, "backingStore")
    while store is not None:
        path = _path(store)
        if path is None or real(path) not in moves:
            node, store = store, child(store, "backingStore")
            continue
        below = child(store, "backingStore")
        if below is not None:
            node.insertBefore(below, store)
        drop(store)
        store = below


def name_file(node: Element, place: Place) -> None:
    """Let a <disk> be the file `place`."""
    block = Path(place.path).is_block_device()
    node.setAttribute("type", "block" if block else "file")
    source = child(node, "source")
    if source is None:
        source = new_element(node, "source")
        insert(node, source, ("driver",))
    for attribute in ("file", "dev", "pool", "volume", "mode", "index"):
        if source.hasAttribute(attribute):
            source.removeAttribute(attribute)
    source.setAttribute("dev" if block else "file", place.path)
    _set_format(node, place.format)


def _set_format(node: Element, fmt: str) -> None:
    driver = child(node, "driver")
    if driver is None:
        driver = new_element(node, "driver")
        node.insertBefore(driver, node.firstChild)
    driver.setAttribute("type", fmt)
