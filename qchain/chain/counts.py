"""Counts over maps: the clusters of one image by state, and who owns which region of a disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.chain.ownership import layer_masks
from qchain.chain.parallel import in_order
from qchain.chain.resolve import mask_windows, windows
from qchain.qcow2.entries import Kind

__all__ = ["ClusterCounts", "count_clusters", "owned_by_region"]


@dataclass(frozen=True, slots=True)
class ClusterCounts:
    """Guest clusters of one image alone; `total` is the sum of all the others.

    With subclusters a cluster is `data` if any of its subclusters is, else `zero` if any
    is. `invalid`: the L2 entry breaks the format.
    """

    total: int
    data: int
    zero: int
    compressed: int
    unallocated: int
    invalid: int


def count_clusters(
    layer: Qcow2Layer, progress: Callable[[int, int], None] | None = None
) -> ClusterCounts:
    """Count the guest clusters of `layer` by state. No other file is read.

    `progress` is called with (guest bytes done, guest bytes in all).

    Raises: `ImageError` when an L2 table cannot be read.
    """
    per_cluster = layer.cluster_size // layer.granularity

    def window(span: tuple[int, int]) -> npt.NDArray[np.int64]:
        cells = layer.cells(*span)
        if cells is None:
            return np.zeros(len(Kind), np.int64)
        if per_cluster == 1:
            return np.bincount(cells.kind, minlength=len(Kind))
        kinds = cells.kind.reshape(-1, per_cluster)
        # The worst or the most solid state of a cluster's subclusters speaks for it.
        out = np.zeros(len(Kind), np.int64)
        left = np.ones(len(kinds), bool)
        for kind in (Kind.INVALID, Kind.COMPRESSED, Kind.DATA, Kind.ZERO):
            has = (kinds == kind).any(axis=1) & left
            out[kind] = np.count_nonzero(has)
            left &= ~has
        return out

    sums = np.zeros(len(Kind), np.int64)
    spans = list(windows([layer]))
    for span, counts in zip(spans, in_order(window, spans), strict=True):
        sums += counts
        if progress is not None:
            progress(span[1], layer.size)
    total = -(-layer.size // layer.cluster_size)
    found = {kind: int(sums[kind]) for kind in Kind}
    data, zero, packed, bad = (
        found[kind] for kind in (Kind.DATA, Kind.ZERO, Kind.COMPRESSED, Kind.INVALID)
    )
    return ClusterCounts(total, data, zero, packed, total - data - zero - packed - bad, bad)


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
