"""`qchain map`: what lies where, as `qemu-img map` tells it, streamed and in bulk.

A map may have millions of extents: they are written a window at a time, and the
text of a window is made from its columns as a whole (`maptext`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Common, Point, command
from .output import note, write, write_ascii

if TYPE_CHECKING:
    from qchain.chain.layer import Layer
    from qchain.chain.resolve import Runs

__all__ = ["map_"]

_AHEAD = 2
"""Windows that are read before the text of the first is written."""


@command
def map_(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image.")],
    common: Point,
    layer: Annotated[
        bool,
        typer.Option("--layer", help="This image alone; its backing file is not opened."),
    ] = False,
) -> None:
    """List the extents of the disk: which layer decides, and where."""
    if layer:
        _layer_map(image, common)
        return
    from .opening import missing_lines, open_for

    with open_for(image, common) as opened:
        bottom = None if opened.missing is None else len(opened.layers) - 1
        _write_map(opened.layers, common, bottom)
        if not common.json:
            write("".join(f"{line}\n" for line in missing_lines(opened)))


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


def _write_map(layers: Sequence[Layer], common: Common, missing: int | None = None) -> None:
    """`missing`: the layer whose backing file is missing and taken for zeroes."""
    from .opening import cut_text

    with common.reporter() as reporter:
        reporter.step("mapping", layers[0].size)
        if not layers[0].size:
            write("[]\n" if common.json else "the disk has no bytes\n")
            return
        first = True
        cut: set[int] = set()
        for text, end in _texts(layers, common.json, missing, cut):
            if first:
                # Every extent of the document has a comma and a newline before it.
                head = f"{'start':>16} {'length':>16} depth  what        offset\n"
                text = b"[" + text[2:] if common.json else head.encode() + text
                first = False
            write_ascii(text)
            reporter.advance(end, layers[0].size)
        if common.json:
            write("]\n")
    for depth in sorted(cut):
        note(cut_text(layers[depth].data.path))


def _texts(
    layers: Sequence[Layer], as_json: bool, missing: int | None, cut: set[int]
) -> Iterator[tuple[bytes, int]]:
    """The text of each window and the guest offset where it ends.

    `cut` gets the layers of which data lies beyond the end of the file.
    The next window is read while a thread makes the text of the one before.
    """
    from collections import deque
    from concurrent.futures import Future, ThreadPoolExecutor

    from qchain.chain.cut import beyond_end
    from qchain.chain.extents import joined_runs

    from .maptext import json_lines

    waiting: deque[tuple[Future[bytes], int]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for table in joined_runs(layers):
            cut.update(beyond_end(layers, table))
            end = int(table.start[-1] + table.length[-1])
            waiting.append((pool.submit(json_lines if as_json else _lines, table, missing), end))
            if len(waiting) > _AHEAD:
                future, end = waiting.popleft()
                yield future.result(), end
        for future, end in waiting:
            yield future.result(), end


def _lines(table: Runs, missing: int | None) -> bytes:
    """The runs as a table for people, one per line, in bytes (`json_lines`)."""
    import numpy as np

    from qchain.qcow2.entries import NO_HOST, Kind

    words = {Kind.DATA: "data", Kind.ZERO: "zero", Kind.COMPRESSED: "compressed"}
    # The class: depth and kind in one number.
    classes = (table.depth.astype(np.int64) * 8 + table.kind).tolist()
    hosts = np.where(table.host == np.uint64(NO_HOST), -1, table.host.astype(np.int64)).tolist()
    tails = {
        number: f"{number // 8:5}  {words.get(Kind(number % 8), 'nothing'):<10}"
        for number in set(classes)
    }
    if missing is not None:
        number = missing * 8 + Kind.UNALLOCATED
        tails[number] = f"{missing:5}  {'missing':<10}"
    columns = (table.start.tolist(), table.length.tolist(), classes, hosts)
    return "".join(
        [
            f"{start:16} {length:16} {tails[number]}  {host if host >= 0 else '-'}\n"
            for start, length, number, host in zip(*columns, strict=True)
        ]
    ).encode("ascii")
