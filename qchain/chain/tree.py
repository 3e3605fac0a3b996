"""Every image below some directories, and who backs on whom: headers only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qchain.chain.gate import Gate
from qchain.chain.names import resolve_backing
from qchain.chain.scan import WORK_PREFIX, identity, unfinished
from qchain.errors import ImageError
from qchain.hostfile import FileId, HostFile, names_in
from qchain.qcow2.foreign import PROBE_BYTES, is_qcow2
from qchain.qcow2.header import read_header

__all__ = ["TreeImage", "read_tree", "unfinished_below"]


@dataclass
class TreeImage:
    """One image: `backing` is the path that its header leads to (None: it has none).

    `virtual_size`: in bytes; None where only the image itself could tell, and it was not read.
    """

    path: Path
    format: str
    virtual_size: int | None = None
    disk_size: int = 0
    backing: Path | None = None
    backing_format: str | None = None
    overlays: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _files(directories: Iterable[Path]) -> Iterator[Path]:
    """Regular files below the directories, sorted, links to directories not followed."""
    for directory in directories:
        if not directory.is_dir():
            raise ImageError(directory, "is not a directory", "name the images' directory")
        for where, names in _walk(directory):
            yield from (path for path in (where / name for name in names) if path.is_file())


def _walk(directory: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every directory from here on, and the names in it that are none of our own.

    As `os.walk` does, those that cannot be read are passed over.
    """
    waiting = [directory]
    while waiting:
        where = waiting.pop()
        try:
            names = [name for name in names_in(where) if not name.startswith(WORK_PREFIX)]
        except OSError:
            continue
        yield where, names
        folders = [where / name for name in names]
        waiting += [each for each in reversed(folders) if each.is_dir() and not each.is_symlink()]


def unfinished_below(directories: Iterable[Path]) -> list[Path]:
    """The journals of merges below the directories that are not finished."""
    return unfinished(where for directory in directories for where, _ in _walk(directory))


def read_tree(
    directories: Iterable[Path],
    gate: Gate | None = None,
    look: Callable[[HostFile], str | None] | None = None,
) -> list[TreeImage]:
    """The images below `directories`: all qcow2 files, and whatever they back on.

    A raw image shows no mark of its own; it is listed when an overlay names it. Files
    behind backing names are identified, never opened.

    Args:
        gate: its `search` says where to look for backing files that are missing.
        look: called with each image that is opened; may return a warning about it.

    Raises: `ImageError` when a directory is none. Problems of images are in the result.
    """
    images: dict[FileId, TreeImage] = {}
    # A file is listed under its own name before that of a link.
    for path in sorted(_files(directories), key=lambda each: each.is_symlink()):
        try:
            with HostFile(path) as file:
                if file.id in images or not is_qcow2(file.pread(0, PROBE_BYTES)):
                    continue
                image = TreeImage(path, "qcow2", disk_size=file.disk_size)
                images[file.id] = image
                warning = None if look is None else look(file)
                image.warnings += [] if warning is None else [warning]
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
            size = -(-status.st_size // 512) * 512 if fmt == "raw" else None
            below = TreeImage(image.backing, fmt, size, status.st_blocks * 512)
            images[found] = below
        below.overlays.append(image.path)
        image.backing = below.path
    by_path = {image.path: image for image in images.values()}
    state: dict[Path, int] = {}
    # Active images first: from there the image that closes a loop is the same one that
    # whoever opens the chain is told.
    for image in sorted(images.values(), key=lambda each: bool(each.overlays)):
        walk: list[Path] = []
        current: TreeImage | None = image
        while current is not None and current.path not in state:
            state[current.path] = 1
            walk.append(current.path)
            current = by_path.get(current.backing) if current.backing is not None else None
        if current is not None and state[current.path] == 1:
            where = "itself" if walk[-1] == current.path else f"{current.path}, which backs on it"
            by_path[walk[-1]].problems.append(f"the chain loops: it backs on {where}")
        for path in walk:
            state[path] = 2
