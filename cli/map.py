"""`qchain map`: what lies where, as `qemu-img map` tells it, streamed and in bulk.

A map may have millions of extents: they are written a window at a time, and the
lines of a window are built in one pass over its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Common, Point, command
from .output import write

if TYPE_CHECKING:
    from qchain.chain.layer import Layer
    from qchain.chain.resolve import Runs

__all__ = ["map_"]


@command
def map_(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image.")],
    common: Point,
    layer: Annotated[
        bool,
        typer.Option("--layer", help="This image alone; its backing file is not opened."),
    ] = False,
) -> None:
    """List the extents of the disk: which layer decides, what is there, where in its file."""
    if layer:
        _layer_map(image, common)
        return
    from .opening import open_for

    with open_for(image, common) as opened:
        _write_map(opened.layers, common)


def _layer_map(image: Path, common: Point) -> None:
    from qchain.chain.chain import named_format, open_layer

    from .opening import refuse_writer

    gate = common.gate()
    with gate.open_named(image) as file:
        if not common.force_share:
            refuse_writer(image, file)
        fmt = named_format(file, common.format)
        found = open_layer(image, file, fmt, gate, image, common.snapshot)
        try:
            _write_map([found], common)
        finally:
            found.data.close()


def _write_map(layers: Sequence[Layer], common: Common) -> None:
    from qchain.chain.extents import joined_runs

    with common.reporter() as reporter:
        reporter.step("mapping", layers[0].size)
        head = None if common.json else f"{'start':>16} {'length':>16} depth  what        offset\n"
        for table in joined_runs(layers):
            if head is not None:
                write(head + _lines(table))
                head = ""
            else:
                lead = "[" if not table.start[0] else ",\n"
                write(lead + _json_lines(table))
            reporter.advance(int(table.start[-1] + table.length[-1]), layers[0].size)
        if common.json:
            write("]\n" if layers[0].size else "[]\n")
        elif not layers[0].size:
            write("the disk has no bytes\n")


def _columns(table: Runs) -> tuple[list[int], list[int], list[int], list[int]]:
    """Starts, lengths, classes (depth and kind in one number), host offsets (-1: none)."""
    import numpy as np

    from qchain.qcow2.entries import NO_HOST

    host = np.where(table.host == np.uint64(NO_HOST), -1, table.host.astype(np.int64))
    classes = table.depth.astype(np.int64) * 8 + table.kind
    return table.start.tolist(), table.length.tolist(), classes.tolist(), host.tolist()


def _json_lines(table: Runs) -> str:
    """The runs as qemu-img's JSON objects, without the brackets around them."""
    starts, lengths, classes, hosts = _columns(table)
    tails = {number: _json_tail(number) for number in set(classes)}
    return ",\n".join(
        [
            f'{{ "start": {start}, "length": {length}{tails[number]}, "offset": {host}}}'
            if host >= 0
            else f'{{ "start": {start}, "length": {length}{tails[number]}}}'
            for start, length, number, host in zip(starts, lengths, classes, hosts, strict=True)
        ]
    )


def _json_tail(number: int) -> str:
    from qchain.qcow2.entries import Kind

    depth, kind = divmod(number, 8)
    data = kind in (Kind.DATA, Kind.COMPRESSED)
    fields = {
        "present": data or kind == Kind.ZERO,
        "zero": not data,
        "data": data,
        "compressed": kind == Kind.COMPRESSED,
    }
    flags = "".join(f', "{name}": {str(is_set).lower()}' for name, is_set in fields.items())
    return f', "depth": {depth}{flags}'


def _lines(table: Runs) -> str:
    """The runs as a table for people, one per line, in bytes."""
    from qchain.qcow2.entries import Kind

    words = {Kind.DATA: "data", Kind.ZERO: "zero", Kind.COMPRESSED: "compressed"}
    starts, lengths, classes, hosts = _columns(table)
    tails = {
        number: f"{number // 8:5}  {words.get(Kind(number % 8), 'nothing'):<10}"
        for number in set(classes)
    }
    return "".join(
        [
            f"{start:16} {length:16} {tails[number]}  {host}\n"
            if host >= 0
            else f"{start:16} {length:16} {tails[number]}  -\n"
            for start, length, number, host in zip(starts, lengths, classes, hosts, strict=True)
        ]
    )
