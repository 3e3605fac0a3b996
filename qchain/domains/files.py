"""The files below a domain's disks: headers only, each file once, whoever names it."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from qchain.chain.chain import open_chain
from qchain.chain.gate import Gate
from qchain.domains.inventory import Inventory
from qchain.domains.records import real
from qchain.errors import ImageError
from qchain.hostfile import FileId

__all__ = ["Files", "ImageFile", "all_files", "files_of"]


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image: sizes in bytes, `below` the real name of its backing file, `owner` a user's."""

    path: str
    format: str
    virtual_size: int
    disk_size: int
    below: str | None
    owner: str


@dataclass
class Files:
    """The images of some disks, by real name. `problems`: those that cannot be opened."""

    images: dict[str, ImageFile] = field(default_factory=dict)
    problems: dict[str, ImageError] = field(default_factory=dict)
    _ids: dict[FileId, str] = field(default_factory=dict)

    def add(self, name: str, gate: Gate) -> None:
        """Take in an image and all that it backs on."""
        if real(name) in self.images or real(name) in self.problems:
            return
        try:
            chain = open_chain(Path(name), gate, known=self._ids.keys())
        except ImageError as error:
            self.problems[real(name)] = error
            return
        with chain:
            names = [real(str(layer.path)) for layer in chain.layers]
            for at, layer in enumerate(chain.layers):
                if layer.file.id in self._ids:
                    break
                below = names[at + 1] if at + 1 < len(names) else None
                if below is not None:
                    below = self._ids.get(chain.layers[at + 1].file.id, below)
                self._ids[layer.file.id] = names[at]
                self.images[names[at]] = ImageFile(
                    str(layer.path.absolute()),
                    layer.format,
                    layer.size,
                    layer.file.disk_size,
                    below,
                    _owner(os.fstat(layer.file.fd).st_uid),
                )

    def line(self, name: str | None) -> list[str]:
        """An image and all that it backs on, by real name; itself first."""
        out: list[str] = []
        at = None if name is None else real(name)
        while at is not None and at in self.images:
            out.append(at)
            at = self.images[at].below
        return out

    def places(self) -> set[Path]:
        """The directories of all images."""
        return {Path(image.path).parent for image in self.images.values()}

    def tops(self) -> list[str]:
        """The images on which no other one backs."""
        below = {image.below for image in self.images.values()}
        return [name for name in self.images if name not in below]


def _owner(number: int) -> str:
    """The user's name, or the number where it has none here."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def named_files(inventory: Inventory, target: str) -> list[str]:
    """What the records name for a disk: the live image, then states and overlays."""
    found = [inventory.disks[target].source.path] if target in inventory.disks else []
    for snapshot in inventory.snapshots.values():
        found.append(snapshot.keeps(target))
        for part in (snapshot.overlays, snapshot.reverted):
            overlay = part.get(target)
            if overlay is not None and overlay.mode == "external" and overlay.source is not None:
                found.append(overlay.source.path)
    return list(dict.fromkeys(path for path in found if path is not None))


def files_of(inventory: Inventory, target: str, gate: Gate, more: Iterable[str] = ()) -> Files:
    """The images of a disk, the live chain first.

    Args:
        more: images that no record names; those that back on nothing of this disk are left out.
    """
    out = Files()
    for name in named_files(inventory, target):
        out.add(name, gate)
    for name in more:
        alone = Files()
        alone.add(name, gate)
        if alone.problems or not out.images.keys().isdisjoint(alone.images):
            out.add(name, gate)
    return out


def all_files(inventory: Inventory, gate: Gate, more: Iterable[str] = ()) -> dict[str, Files]:
    """The images of every disk that is on local files, by target."""
    return {
        target: files_of(inventory, target, gate, more)
        for target, disk in inventory.disks.items()
        if disk.source.path is not None
    }
