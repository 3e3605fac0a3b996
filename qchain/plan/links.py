"""Images under names that are symbolic links: merged where they lie, so that the link stays."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from qchain.chain.layer import Layer
from qchain.chain.names import resolve_backing
from qchain.chain.scan import identity
from qchain.errors import QchainError

__all__ = ["stand_for_links"]


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
