"""Images under names that are symbolic links: merged where they lie, so that the link stays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from qchain.chain.chain_tree import ChainTree
from qchain.chain.layer import Layer
from qchain.chain.names import resolve_backing
from qchain.chain.scan import identity
from qchain.errors import QchainError

__all__ = ["link_directories", "seen_from", "stand_for_links"]


def stand_for_links(layers: Iterable[Layer]) -> dict[Path, Path]:
    """Give each layer that is a link to a file the file's own name.

    Only where its backing name means the same file from there: qemu resolves it from the
    directory of the name by which an image is opened. Others stay links, which a merge refuses.
    Block devices keep the links that are their names.

    Returns: the links, by the files' own names.
    """
    links: dict[Path, Path] = {}
    for layer in layers:
        if layer.path.is_symlink() and not layer.file.is_block_device:
            real = Path(os.path.realpath(layer.path))
            if identity(real) == layer.file.id and _same_below(layer, real):
                links[real], layer.path = layer.path.absolute(), real
    return links


def seen_from(tree: ChainTree, indices: Iterable[int], links: Mapping[Path, Path]) -> list[Path]:
    """The other directories from which qemu resolves the backing names of these images.

    It counts a relative name from the directory of the name by which it opens an image, not
    from where a link leads: the directories of the links, and of the names in their overlays.
    """
    out: dict[Path, None] = {}
    for index in indices:
        layer = tree.layers[index]
        home = identity(layer.path.parent)
        names = [links[layer.path]] if layer.path in links else []
        for above in tree.overlays[index]:
            overlay = tree.layers[above]
            if overlay.backing is not None:
                opened = links.get(overlay.path, overlay.path)
                name, fmt = overlay.backing.name, overlay.backing.format
                names.append(resolve_backing(name, fmt, opened).path)
        out |= {name.parent: None for name in names if identity(name.parent) != home}
    return list(out)


def link_directories(links: Iterable[Path]) -> list[Path]:
    """The directories of these links, and of every further link on the way to the file."""
    out: dict[Path, None] = {}
    for link in links:
        name = link
        # A file was opened through it, so that it ends.
        while name.is_symlink():
            out[Path(os.path.realpath(name.parent))] = None
            name = name.parent / name.readlink()
    return list(out)


def _same_below(layer: Layer, real: Path) -> bool:
    if layer.backing is None:
        return True
    name, fmt = layer.backing.name, layer.backing.format
    try:
        here, there = resolve_backing(name, fmt, layer.path), resolve_backing(name, fmt, real)
    except QchainError:
        return False
    below = identity(here.path)
    return below is not None and below == identity(there.path)
