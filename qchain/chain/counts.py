"""Counts over maps: the clusters of one image by state, and who owns which region of a disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Cells, Layer, Qcow2Layer
from qchain.chain.ownership import layer_masks
from qchain.chain.parallel import in_order
from qchain.chain.resolve import mask_windows, windows
from qchain.qcow2.entries import Kind

__all__ = ["ClusterCounts", "count_clusters", "owned_by_region"]


@dataclass(frozen=True, slots=True)
class ClusterCounts:
    """Guest clusters of one image alone; `total` is the sum of all kinds.

    With subclusters a cluster is `data` if any of its subclusters is, else `zero` if any
    is. `invalid`: the L2 entry breaks the format. `beyond`: of `data`, those that reach
    beyond the end of the file, where they read as zeroes.
    """

    total: int
    data: int
    zero: int
    compressed: int
    unallocated: int
    invalid: int
    beyond: int = 0


def count_clusters(
    layer: Qcow2Layer, progress: Callable[[int, int], None] | None = None
) -> ClusterCounts:
    """Count the guest clusters of `layer` by state. No other file is read.

    `progress` is called with (guest bytes done, guest bytes in all).

    Raises: `ImageError` when an L2 table cannot be read.
    """
    per_cluster = layer.cluster_size // layer.granularity

    def window(span: tuple[int, int]) -> tuple[npt.NDArray[np.int64], int]:
        cells = layer.cells(*span)
        if cells is None:
            return np.zeros(len(Kind), np.int64), 0
        beyond = _beyond(layer, span[0], cells)
        if per_cluster == 1:
            return np.bincount(cells.kind, minlength=len(Kind)), beyond
        kinds = cells.kind.reshape(-1, per_cluster)
        # The worst or the most solid state of a cluster's subclusters speaks for it.
        out = np.zeros(len(Kind), np.int64)
        left = np.ones(len(kinds), bool)
        for kind in (Kind.INVALID, Kind.COMPRESSED, Kind.DATA, Kind.ZERO):
            has = (kinds == kind).any(axis=1) & left
            out[kind] = np.count_nonzero(has)
            left &= ~has
        return out, beyond

    sums, beyond = np.zeros(len(Kind), np.int64), 0
    spans = list(windows([layer]))
    for span, (counts, more) in zip(spans, in_order(window, spans), strict=True):
        sums += counts
        beyond += more
        if progress is not None:
            progress(span[1], layer.size)
    total = -(-layer.size // layer.cluster_size)
    found = {kind: int(sums[kind]) for kind in Kind}
    data, zero, packed, bad = (
        found[kind] for kind in (Kind.DATA, Kind.ZERO, Kind.COMPRESSED, Kind.INVALID)
    )
    rest = total - data - zero - packed - bad
    return ClusterCounts(total, data, zero, packed, rest, bad, beyond)


def _beyond(layer: Qcow2Layer, start: int, cells: Cells) -> int:
    """Clusters of the window from `start` on whose data reaches beyond the end of the file."""
    if layer.data_file is not None:
        return 0
    end = layer.file.size
    # Without a sign, no host is -1: mostly one look at the greatest is enough.
    host = cells.host.view(np.int64)
    if int(host.max()) + cells.unit <= end:
        return 0
    past = (cells.kind == Kind.DATA) & (host > end - cells.unit)
    # Of the disk's last cluster only what the guest sees counts.
    last = (layer.size - start - 1) // cells.unit
    past[last + 1 :] = False
    if last < len(past) and past[last]:
        past[last] = int(host[last]) + layer.size - (start + last * cells.unit) > end
    per_cluster = layer.cluster_size // cells.unit
    return int(np.count_nonzero(past.reshape(-1, per_cluster).any(axis=1)))


def owned_by_region(layers: Sequence[Layer], regions: int) -> npt.NDArray[np.float64]:
    """How many bytes each layer owns in each of `regions` equal parts of the disk.

    Args:
        layers: active first.

    Returns: shape (layers, regions), bytes; a cell that lies in two parts counts in both
        by its share.
    Raises: `ImageError` when a map cannot be read.
    """
    size = layers[0].size
    out = np.zeros((len(layers), regions))
    if size == 0:
        return out
    edges = np.arange(regions + 1) * (size / regions)

    def window(span: tuple[int, int]) -> list[tuple[int, int, npt.NDArray[np.float64]]]:
        start, end = span
        first = min(int(start * regions / size), regions - 1)
        last = min(int(np.searchsorted(edges, end, "left")), regions)
        inner = np.clip(edges[first : last + 1], start, end)
        return [
            (index, first, _spread(mask, unit, inner - start))
            for index, unit, mask in _owned(layers, start, end)
        ]

    for found in in_order(window, list(mask_windows(layers))):
        for index, first, amounts in found:
            out[index, first : first + len(amounts)] += amounts
    return out


def _owned(
    layers: Sequence[Layer], start: int, end: int
) -> list[tuple[int, int, npt.NDArray[np.bool_]]]:
    """(layer, bytes per cell, cells that this layer owns) for a window."""
    unit, masks = layer_masks(layers, start, end)
    visible = np.ones((end - start) // unit, bool)
    out = []
    for index, (layer, answer) in enumerate(zip(layers, masks, strict=True)):
        if answer is not None:
            out.append((index, unit, answer.allocated & visible))
            visible &= ~answer.allocated
        if layer.size < end:
            # Past its end a layer reads as zeroes and hides what lies below.
            visible[max(0, layer.size - start) // unit :] = False
    return out


def _spread(
    mask: npt.NDArray[np.bool_], unit: int, edges: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Bytes of the set cells between consecutive `edges` (offsets in the window)."""
    if len(edges) == 2:
        # A window within one region, as in all large disks: no running sum is needed.
        return np.array([np.count_nonzero(mask) * float(unit)])
    sums = np.concatenate(([0.0], np.cumsum(mask, dtype=np.float64) * unit))
    amounts: npt.NDArray[np.float64] = np.diff(
        np.interp(edges, np.arange(len(sums)) * float(unit), sums)
    )
    return amounts
