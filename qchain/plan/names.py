"""Names as steps write them: of images, of backing files in headers, of files that are kept."""

from __future__ import annotations

import os
from pathlib import Path

from qchain.chain.layer import Layer

__all__ = [
    "MANIFEST_SUFFIX",
    "SAVED_SUFFIX",
    "absolute_name",
    "backing_name",
    "relative_name",
    "saved_name",
]

SAVED_SUFFIX = ".qchain-old"
"""What --keep-files appends to the name of a file that another one replaces; where that
name is taken, a number follows."""

MANIFEST_SUFFIX = ".qchain-manifest"
"""The same for the manifest of a merge with --verify manifest, beside the result."""


def absolute_name(path: Path) -> Path:
    """Absolute, without following links: the name is what other files refer to."""
    return Path(os.path.normpath(path.absolute())) if ".." not in path.parts else path.absolute()


def saved_name(path: Path, ending: str = SAVED_SUFFIX) -> Path:
    """Where --keep-files saves the file that loses the name `path`: a name that is free."""
    number = 1
    while True:
        suffix = ending if number == 1 else f"{ending}.{number}"
        saved = path.with_name(path.name + suffix)
        if not os.path.lexists(saved):
            return saved
        number += 1


def backing_name(overlay: Layer, below: Layer, directory: Path) -> str:
    """How an image in `directory` names `below`: as `overlay` does, which backs on it.

    What is absolute stays so, and what is relative.
    """
    path = absolute_name(below.path)
    if overlay.backing is None or overlay.backing.name.startswith("/"):
        return str(path)
    if absolute_name(overlay.path).parent == directory:
        return overlay.backing.name
    return relative_name(path, directory)


def relative_name(path: Path, directory: Path) -> str:
    """`path` as an image in `directory` names it. Both exist.

    As text alone it may be wrong: `..` behind a link to a directory is the parent of
    where the link leads, and so the kernel takes it.
    """
    name = os.path.relpath(path, directory)
    try:
        if (directory / name).samefile(path):
            return name
    except OSError:
        pass
    real = Path(os.path.realpath(path.parent)) / path.name
    return os.path.relpath(real, os.path.realpath(directory))
