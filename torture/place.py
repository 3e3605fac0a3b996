"""Where the images of a case lie: built once, put there anew for every try; and the judge.

The judge is qemu-img (`fixtures.oracle`) with the shadow model. It reads in spite of locks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fixtures.build import build_layer
from fixtures.language import resolve_size
from fixtures.oracle import QemuError, qemu_check, qemu_img, qemu_info
from fixtures.shadow import shadow_tree
from torture.cases import Case

__all__ = ["Loss", "Place", "Planned"]

Attributes = tuple[int, int, int, bytes | None]


class Loss(Exception):
    """Data lost, a recovery that failed, something left over: what must never be."""


@dataclass(frozen=True)
class Planned:
    """What the plan promised. `results`: which file shows which kept point in the end."""

    results: dict[str, str]
    groups: int
    alone: bool
    """Whether merging again after it was put back asks for the same."""


class Place:
    """The images of one case below `directory`, which may be a file system of its own."""

    def __init__(self, case: Case, scratch: Path, directory: Path) -> None:
        self.case, self.scratch, self.directory = case, scratch, directory
        self.points = shadow_tree(case.tree)
        self.template = scratch / "template"
        self.raw = scratch / "judged.raw"

    def build(self) -> None:
        """Build the template. Absolute names are those of `directory`."""
        sizes: dict[str, int] = {}
        shutil.rmtree(self.template, ignore_errors=True)
        for image in self.case.images:
            path = self.directory / image.name
            backing = None
            below = None
            if image.parent is not None:
                lower = self.directory / image.parent
                name = str(lower) if image.whole else os.path.relpath(lower, path.parent)
                backing = (name, next(i.format for i in self.case.images if i.name == image.parent))
                below = sizes[image.parent]
            sizes[image.name] = resolve_size(image.spec, below)
            build_layer(path, image.spec, sizes[image.name], backing)
            path.chmod(image.mode)
            if os.geteuid() == 0:
                os.chown(path, image.owner, image.owner)
            with suppress(OSError):
                os.setxattr(path, "user.torture", image.name.encode())
        subprocess.run(["cp", "-a", "--sparse=always", self.directory, self.template], check=True)

    def restore(self) -> None:
        """The images as they were built, and nothing else."""
        shutil.rmtree(self.directory, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=always", self.template, self.directory], check=True)
        self.attributes = {image.name: self._attributes(image.name) for image in self.case.images}

    def _attributes(self, name: str) -> Attributes:
        """Mode, owner, group, an extended attribute."""
        path = self.directory / name
        status = path.stat()
        mark = None
        with suppress(OSError):
            mark = os.getxattr(path, "user.torture")
        return status.st_mode, status.st_uid, status.st_gid, mark

    def names(self) -> set[str]:
        """All files that there are."""
        return {
            str(path.relative_to(self.directory))
            for path in self.directory.rglob("*")
            if path.is_symlink() or not path.is_dir() or path.name.startswith(".")
        }

    def directories(self) -> list[str]:
        """Where images lie."""
        return sorted({str((self.directory / image.name).parent) for image in self.case.images})

    # --- judging ------------------------------------------------------------------------

    def content(self, name: str) -> bytes:
        """What the guest reads there, says qemu-img. Raises `Loss` when it cannot be read."""
        path = self.directory / name
        until = time.monotonic() + 20
        while True:
            try:
                qemu_img("convert", "-U", "-f", format_of(path), "-O", "raw", path, self.raw)
                return self.raw.read_bytes()
            except (OSError, QemuError) as error:
                # A commit lets nobody read what lies between, not even so: it goes on alone.
                if "Failed to get" not in str(error) or time.monotonic() > until:
                    raise Loss(f"{name} cannot be read: {error}") from None
            time.sleep(0.05)

    def intact(self, planned: Planned, when: str) -> None:
        """Every kept point reads as before, under its name.

        Where the policy gives it another one, it may be found there once the old one is gone.
        """
        for point in self.case.kept:
            name = point
            if not os.path.lexists(self.directory / name) and self.case.names != "kept":
                name = next(name for name, shown in planned.results.items() if shown == point)
            if self.content(name) != self.points[point]:
                raise Loss(f"{when}: {name} does not read as {point} did")

    def untouched(self) -> bool:
        """Whether no name has come or gone: then a merge may begin anew."""
        return self.names() == {image.name for image in self.case.images}

    def finished(self, planned: Planned, when: str) -> None:
        """All is as it was planned: names, contents, chain, modes; nothing is left over."""
        if (names := self.names()) != set(planned.results):
            raise Loss(f"{when}: there are {sorted(names)}, not {sorted(planned.results)}")
        shown = {point: name for name, point in planned.results.items()}
        for name, point in planned.results.items():
            path = self.directory / name
            if self.content(name) != self.points[point]:
                raise Loss(f"{when}: {name} does not read as {point} did")
            if self._attributes(name) != self.attributes[name]:
                raise Loss(
                    f"{when}: {name} has {self._attributes(name)}, not {self.attributes[name]}"
                )
            if format_of(path) == "qcow2":
                self._linked(path, self.case.kept_below(point), shown, when)

    def consistent(self, when: str) -> None:
        """Of several groups some are merged: whatever is there is whole, and nothing of ours."""
        for name in self.names():
            if ".qchain" in name:
                raise Loss(f"{when}: {name} is left over")
            path = self.directory / name
            if format_of(path) == "qcow2" and qemu_check(path)["corruptions"]:
                raise Loss(f"{when}: {name} is corrupt")

    def _linked(self, path: Path, below: str | None, shown: dict[str, str], when: str) -> None:
        """An image of the result backs on the right one, and is consistent."""
        info = qemu_info(path)
        name, fmt = info.get("backing-filename"), info.get("backing-filename-format")
        found = None if name is None else os.path.normpath(path.parent / name)
        wanted = None if below is None else self.directory / shown[below]
        right = None if wanted is None else format_of(wanted)
        if (found, fmt) != (None if wanted is None else str(wanted), right):
            raise Loss(f"{when}: {path.name} backs on {found} ({fmt}), not {wanted} ({right})")
        if corruptions := qemu_check(path)["corruptions"]:
            raise Loss(f"{when}: {path.name} has {corruptions} corruptions")


def format_of(path: Path) -> str:
    """By its first bytes."""
    with path.open("rb") as file:
        return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"
