"""`qchain tree`: every image below some directories, and who backs on whom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qchain.errors import printable

from .options import Common, command
from .output import absolute, write, write_json

if TYPE_CHECKING:
    from qchain.chain.tree import TreeImage
    from qchain.hostfile import HostFile

__all__ = ["tree"]


@command
def tree(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Looked through, with all below.")
    ],
    common: Common,
) -> None:
    """Show all images of directories: who backs on whom."""
    from qchain.chain.tree import read_tree, unfinished_below
    from qchain.forensics.staleness import tree_staleness

    from .opening import tell_unfinished, unfinished_field

    # Only headers are read, so an image in use does not forbid the whole directory.
    images = read_tree(directories, common.gate(), None if common.force_share else _in_use)
    for image in images:
        if image.backing is not None:
            found = tree_staleness(image.path, image.backing)
            image.warnings += [] if found is None else [found]
    journals = unfinished_below(directories)
    if common.json:
        listed = [_as_json(image) for image in images]
        write_json({"images": listed} | unfinished_field(journals))
    else:
        write(_picture(images))
        tell_unfinished(journals)


def _in_use(file: HostFile) -> str | None:
    from qchain.run.locks import holder_name, probe

    if not probe(file.fd).writer:
        return None
    return f"in use by {holder_name(file.fd) or 'another process'}: this may change at any moment"


def _as_json(image: TreeImage) -> dict[str, Any]:
    return {
        "path": absolute(image.path),
        "format": image.format,
        "virtual_size": image.virtual_size,
        "disk_size": image.disk_size,
        "backing": None if image.backing is None else absolute(image.backing),
        "backing_format": image.backing_format,
        "overlays": [absolute(path) for path in image.overlays],
        "problems": image.problems,
        "warnings": image.warnings,
    }


def _picture(images: list[TreeImage]) -> str:
    """Bases at the left, each overlay indented below what it backs on."""
    from .tables import fold

    if not images:
        return "no images\n"
    by_path = {image.path: image for image in images}
    lines: list[str] = []
    drawn: set[Path] = set()

    def draw(root: TreeImage) -> None:
        # A stack, not recursion: chains of thousands of images are real.
        stack: list[tuple[TreeImage, str, str]] = [(root, "", "")]
        while stack:
            image, lead, below = stack.pop()
            if image.path in drawn:
                continue
            drawn.add(image.path)
            lines.append(fold(lead, _line(image), below + ("|   " if image.overlays else "    ")))
            notes = [f"! {text}" for text in image.problems]
            notes += [f"? {text}" for text in image.warnings]
            overlays = [by_path[path] for path in image.overlays if path in by_path]
            bar = "|   " if overlays else "    "
            lines.extend(fold(below + bar, printable(text), below + bar + "  ") for text in notes)
            for position, overlay in enumerate(reversed(overlays)):
                last = position == 0
                more = below + ("    " if last else "|   ")
                stack.append((overlay, f"{below}{'`-- ' if last else '|-- '}", more))

    # What is in a loop, or on top of something missing, has no base that could lead to it.
    for image in images:
        if image.backing is None or image.backing not in by_path:
            draw(image)
    for image in images:
        if image.path not in drawn:
            draw(image)
    return "".join(lines)


def _line(image: TreeImage) -> str:
    from .tables import size_text

    size = f"{size_text(image.disk_size)} on disk"
    if image.virtual_size is not None:
        size = f"{size_text(image.virtual_size)}, {size}"
    fmt = "format not recorded" if image.format == "unknown" else image.format
    return f"{printable(image.path)}  ({fmt}, {size})"
