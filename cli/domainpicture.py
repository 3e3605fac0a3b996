"""The picture of `qchain domain show`: snapshots beside the files that they are tied to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qchain.errors import printable

from .tables import size_text

if TYPE_CHECKING:
    from qchain.domains.files import Files
    from qchain.domains.inventory import Inventory

__all__ = ["picture"]


def picture(inventory: Inventory, files: dict[str, Files]) -> str:
    """The snapshot tree, then each disk's file tree with what every file is."""
    running = "running" if inventory.active else "shut off"
    lines = [f"{inventory.name}  ({running})", "", "snapshots"]
    if not inventory.snapshots:
        lines.append("    none")
    stack = [(each, "    ") for each in inventory.children(None)[::-1]]
    while stack:
        snapshot, lead = stack.pop()
        mark = "  <- current" if snapshot.name == inventory.current else ""
        about = f"  ({snapshot.description})" if snapshot.description else ""
        lines.append(f"{lead}{snapshot.name}{about}{mark}")
        stack += [(each, lead + "    ") for each in inventory.children(snapshot.name)[::-1]]
    for target, disk in inventory.disks.items():
        lines += ["", f"{target}  ({disk.source.kind})"]
        lines += _files(inventory, target, files[target])
    return "".join(f"{printable(line)}\n" for line in lines)


def _files(inventory: Inventory, target: str, files: Files) -> list[str]:
    roles = _roles(inventory, target)
    above: dict[str | None, list[str]] = {}
    for name, image in files.images.items():
        above.setdefault(image.below, []).append(name)
    rows: list[tuple[str, str, str]] = []
    stack = [(name, 0) for name in above.get(None, [])[::-1]]
    while stack:
        name, depth = stack.pop()
        image = files.images[name]
        place = "    " * (depth + 1) + Path(image.path).name
        size = f"{image.format}, {size_text(image.disk_size)}, {image.owner}"
        rows.append((place, size, ", ".join(roles.get(name, ["named by no record"]))))
        stack += [(each, depth + 1) for each in above.get(name, [])[::-1]]
    width = max((len(place) for place, _, _ in rows), default=0)
    middle = max((len(size) for _, size, _ in rows), default=0)
    lines = [f"{place:<{width}}  {size:<{middle}}  {role}" for place, size, role in rows]
    return lines + [f"    {name}  missing or not readable" for name in files.problems]


def _roles(inventory: Inventory, target: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}

    def add(path: str | None, role: str) -> None:
        if path is not None:
            out.setdefault(os.path.realpath(path), []).append(role)

    add(inventory.disks[target].source.path, "live")
    for snapshot in inventory.snapshots.values():
        add(snapshot.keeps(target), f"state of {snapshot.name}")
        for overlay in (snapshot.overlays.get(target), snapshot.reverted.get(target)):
            if overlay is not None and overlay.mode == "external" and overlay.source is not None:
                add(overlay.source.path, f"overlay of {snapshot.name}")
    return out
