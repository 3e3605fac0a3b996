"""The pieces in which qemu's block status gives what lies below an image.

One status reaches as far as the layer that decides has clusters of one kind that follow each
other in its file, and no further than any layer above it stays unallocated, nor than the L2
table of each of these layers.

layer 1    .  .  .  .  | .  .  .  A  A         |: its next L2 table
layer 2    B  B  C  C  C  C  .  .  .           C follows B in the guest, not in the file
pieces     [--]  [--]   [-]  .  [--]

Source: `bdrv_common_block_status_above`, `qcow2_get_host_offset`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer, Masks, Qcow2Layer
from qchain.qcow2.entries import NO_HOST, Kind

__all__ = ["finest_below", "piece_starts", "table_span"]

Bools = npt.NDArray[np.bool_]


def table_span(layer: Layer) -> int:
    """Guest bytes that one L2 table covers; more than any disk has for a raw image."""
    if isinstance(layer, Qcow2Layer):
        return layer.cluster_size * layer.tables.per_table
    return 1 << 62


def piece_starts(
    layers: Sequence[Layer], wanted: Iterable[int], unit: int, start: int, count: int
) -> dict[int, Bools]:
    """Where a piece begins, for each of `wanted` (an index): seen below that layer.

    Args:
        layers: from any one down to that above the new backing.
        unit: bytes of a cell; divides the granularity, the ends and the table spans of all.
        start: guest byte of the first cell.

    Returns: shape (count,) each; the first cell is told only where a table begins.
    """
    end = start + unit * count
    left = set(wanted)
    out: dict[int, Bools] = {}
    begins = np.zeros(count, bool)
    for index in range(len(layers) - 1, -1, -1):
        layer = layers[index]
        kind = np.zeros(count, np.uint8)
        host = np.full(count, NO_HOST, np.uint64)
        cells = layer.cells(start, min(end, layer.size)) if start < layer.size else None
        if cells is not None:
            cells = cells.refine(unit)
            used = min(count, len(cells.kind), -(-(layer.size - start) // unit))
            kind[:used], host[:used] = cells.kind[:used], cells.host[:used]
        kind[max(0, -(-(layer.size - start) // unit)) :] = Kind.PAST_END
        follows = np.where(
            (host[:-1] == NO_HOST) | (kind[:-1] == Kind.COMPRESSED),
            host[:-1],
            host[:-1] + np.uint64(unit),
        )
        changes = (kind[1:] != kind[:-1]) | (host[1:] != follows)
        through = (kind[1:] == Kind.UNALLOCATED) & (kind[:-1] == Kind.UNALLOCATED)
        if index in left:
            # Its own clusters with and without a place in the file are told apart too.
            out[index] = begins | _tables(layer, unit, start, count)
            out[index][1:] |= changes & through
            left.remove(index)
            if not left:
                break
        begins = begins.copy()
        begins[1:] = changes | (begins[1:] & through)
        begins |= _tables(layer, unit, start, count)
    return out


def _tables(layer: Layer, unit: int, start: int, count: int) -> Bools:
    """The cells at which an L2 table of `layer` begins."""
    out = np.zeros(count, bool)
    span = table_span(layer)
    first = -start % span
    last = min(count * unit, layer.size - start)
    if first < last:
        out[np.arange(first, last, span) // unit] = True
    return out


def finest_below(
    layers: Sequence[Layer], found: Sequence[Masks | None], start: int, end: int, reach: int
) -> list[int]:
    """Per layer, bytes of the finest unit of the pieces below it, in the window [start, end).

    `found`: what each layer allocates there. `reach`: how far behind the end of a layer the
    pieces are still cut out of step.
    """
    out: list[int] = []
    finest = end - start
    for layer, masks in zip(reversed(layers), reversed(found), strict=True):
        out.append(finest)
        if start < layer.size:
            finest = min(finest, table_span(layer))
        if start - reach < layer.size < end:
            finest = min(finest, layer.size & -layer.size)
        if masks is not None:
            finest = min(finest, masks.unit)
    return out[::-1]
