"""Every image below some directories, and who backs on whom: headers only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qchain.chain.gate import Gate
from qchain.chain.names import resolve_backing
from qchain.chain.scan import WORK_PREFIX, identity
from qchain.errors import ImageError
from qchain.hostfile import FileId, HostFile
from qchain.qcow2.foreign import PROBE_BYTES, is_qcow2
from qchain.qcow2.header import read_header

__all__ = ["TreeImage", "read_tree"]


@dataclass
class TreeImage:
    """One image: `backing` is the path that its header leads to (None: it has none)."""

    path: Path
    format: str
    virtual_size: int = 0
    disk_size: int = 0
    backing: Path | None = None
    backing_format: str | None = None
    overlays: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _files(directories: Iterable[Path]) -> Iterator[Path]:
    """Regular files below the directories, sorted, links to directories not followed."""
    for directory in directories:
        if not directory.is_dir():
            raise ImageError(directory, "is not a directory", "name the images' directory")
        for where, folders, names in os.walk(directory):
            folders[:] = sorted(name for name in folders if not name.startswith(WORK_PREFIX))
            for name in sorted(names):
                path = Path(where) / name
                if not name.startswith(WORK_PREFIX) and path.is_file():
                    yield path


def read_tree(directories: Iterable[Path], gate: Gate | None = None) -> list[TreeImage]:
    """The images below `directories`: all qcow2 files, and whatever they back on.

    A raw image shows no mark of its own; it is listed when an overlay names it. Files
    behind backing names are identified, never opened.

    Args:
        gate: its `search` says where to look for backing files that are missing.

    Raises: `ImageError` when a directory is none. Problems of images are in the result.
    """
    images: dict[FileId, TreeImage] = {}
    for path in _files(directories):
        try:
            with HostFile(path) as file:
                if file.id in images or not is_qcow2(file.pread(0, PROBE_BYTES)):
                    continue
                image = TreeImage(path, "qcow2", disk_size=file.disk_size)
                images[file.id] = image
                header = read_header(file)
        except ImageError as error:
            if path in {found.path for found in images.values()}:
                image.problems.append(error.why)
            continue
        image.virtual_size = header.size
        image.problems += header.problems
        if header.backing_name is not None:
            try:
                below = resolve_backing(header.backing_name, header.backing_format, path)
            except ImageError as error:
                image.problems.append(error.why)
                continue
            where = below.path if gate is None else gate.locate(below.path, path)
            image.backing, image.backing_format = where, below.format
            if below.format is None:
                image.problems.append("the format of its backing file is not recorded")
    _connect(images)
    return sorted(images.values(), key=lambda image: image.path)


def _connect(images: dict[FileId, TreeImage]) -> None:
    """Find the overlays of each, add raw bases, name what is missing and loops."""
    for image in list(images.values()):
        if image.backing is None:
            continue
        found = identity(image.backing)
        if found is None:
            image.problems.append(f"its backing file {image.backing} is missing")
            continue
        below = images.get(found)
        if below is None:
            # Outside of the directories, or raw: what its overlay says of it is all we know.
            status = image.backing.stat()
            fmt = image.backing_format or "unknown"
            size = -(-status.st_size // 512) * 512 if fmt == "raw" else 0
            below = TreeImage(image.backing, fmt, size, status.st_blocks * 512)
            images[found] = below
        below.overlays.append(image.path)
        image.backing = below.path
    by_path = {image.path: image for image in images.values()}
    state: dict[Path, int] = {}
    for image in images.values():
        walk: list[Path] = []
        current: TreeImage | None = image
        while current is not None and current.path not in state:
            state[current.path] = 1
            walk.append(current.path)
            current = by_path.get(current.backing) if current.backing is not None else None
        if current is not None and state[current.path] == 1 and current.path in walk:
            current.problems.append("the chain loops: it backs on itself")
        for path in walk:
            state[path] = 2
