"""`qchain chain`: the layers of a disk, what each holds, and who owns what the guest sees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Common, command
from .output import absolute, note, write, write_json

if TYPE_CHECKING:
    from qchain.chain.chain import Chain
    from qchain.chain.layer import Layer
    from qchain.chain.ownership import Ownership

__all__ = ["chain"]


@command
def chain(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The active image.")],
    common: Common,
) -> None:
    """Show a chain: its layers, what each holds, who owns what."""
    from qchain.chain.cut import counted_beyond
    from qchain.chain.ownership import ownership
    from qchain.chain.scan import unfinished_of
    from qchain.forensics.staleness import relocated, staleness

    from .opening import cut_text, missing_field, open_for, tell_unfinished, unfinished_field

    with open_for(image, common) as opened:
        with common.reporter() as reporter:
            reporter.step("reading maps", opened.size)
            owned = ownership(opened.layers, reporter.advance)
        warnings = staleness(opened.layers)
        warnings += [cut_text(layer.path) for layer in opened.layers if counted_beyond(layer)]
        journals = unfinished_of(layer.path for layer in opened.layers)
        if common.json:
            layers = [_as_json(*pair) for pair in zip(opened.layers, owned, strict=True)]
            fields = {"virtual_size": opened.size, "layers": layers, "warnings": warnings}
            fields["relocated"] = relocated(opened.layers)
            write_json(fields | missing_field(opened) | unfinished_field(journals))
        else:
            _show(opened, owned)
            tell_unfinished(journals)
            for text in (*relocated(opened.layers), *warnings):
                note(text)


def _as_json(layer: Layer, owned: Ownership) -> dict[str, Any]:
    backing = layer.backing
    return {
        "path": absolute(layer.path),
        "format": layer.format,
        "version": None if layer.header is None else layer.header.version,
        "virtual_size": layer.size,
        "cluster_size": None if layer.header is None else layer.header.cluster_size,
        "file_size": layer.file.size,
        "disk_size": layer.file.disk_size,
        "allocated_bytes": owned.allocated,
        "owned_bytes": owned.owned,
        "shadowed_bytes": owned.shadowed,
        "backing": None if backing is None else {"name": backing.name, "format": backing.format},
    }


def _show(opened: Chain, owned: list[Ownership]) -> None:
    from qchain.chain.counts import owned_by_region

    from .picture import draw, regions
    from .tables import count_text, size_text, write_table

    layers = opened.layers
    count = count_text(len(layers), "layer")
    write(f"Disk of {size_text(opened.size)}, {count}, the active one first\n\n")
    rows = [
        (
            index,
            layer.path.name,
            layer.format,
            size_text(layer.size),
            size_text(layer.file.disk_size),
            size_text(amount.allocated),
            size_text(amount.owned),
            size_text(amount.shadowed),
        )
        for index, (layer, amount) in enumerate(zip(layers, owned, strict=True))
    ]
    if opened.missing is not None:
        rows.append((len(rows), opened.missing.name, "missing", "-", "-", "-", "-", "-"))
    heads = ("#>", "image", "format", "virtual>", "on disk>", "allocated>", "owned>", "shadowed>")
    write_table(heads, rows)
    write("\n" + draw(owned_by_region(layers, regions()), opened.size))
