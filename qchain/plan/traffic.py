"""What moves: bytes read and written by every way of merging a group, counted from the maps.

For a group F(i)..F(j) (j kept) and a target t, per cell in the finest unit:

    commit into t    A(t+1) ∪ … ∪ A(j), rounded out to qemu's granularity
    pull into t      (A(i) ∪ … ∪ A(t-1)) \\ (A(t) ∪ … ∪ A(j))

All targets are counted in one pass over the maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer, Masks, Qcow2Layer
from qchain.chain.ownership import unify, workers
from qchain.chain.resolve import windows

__all__ = ["Traffic", "commit_granularity", "count_traffic"]

Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Traffic:
    """What one target costs, in bytes (extents and tables are counts).

    Attributes:
        commit_bytes: data that the commit into the target reads, and writes.
        commit_zero_bytes: zero writes of the commit; they carry no data.
        pull_bytes: what the pull into the target moves (zero clusters included: rebase
            turns them into data where the new backing is not zero).
        extents: contiguous runs of both.
        new_clusters: clusters of the target that get data and had none.
        new_tables: L2 tables of the target that come into being, for zero writes too.
    """

    commit_bytes: int = 0
    commit_zero_bytes: int = 0
    pull_bytes: int = 0
    extents: int = 0
    new_clusters: int = 0
    new_tables: int = 0

    def add(self, other: Traffic) -> None:
        for name in Traffic.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def commit_granularity(target: Layer) -> int:
    """The unit of a commit into `target`: its cluster size between 4K and 64K, raw 64K.

    Source: qemu's `bdrv_get_default_bitmap_granularity`.
    """
    if target.header is None:
        return 65536
    return min(max(target.header.cluster_size, 4096), 65536)


def _runs(mask: Bools) -> int:
    """How many contiguous runs of True."""
    if not len(mask):
        return 0
    return int(mask[0]) + int(np.count_nonzero(mask[1:] > mask[:-1]))


def _round_out(mask: Bools, unit: int, to: int) -> Bools:
    """`mask` (cells of `unit`) grown to whole pieces of `to` bytes, still in cells of `unit`."""
    return np.repeat(_any_of(mask, unit, to), max(1, to // unit))[: len(mask)]


def _any_of(mask: Bools, unit: int, to: int) -> Bools:
    """Per piece of `to` bytes: is any cell set? (`to` ≤ `unit`: the cells themselves.)"""
    factor = to // unit
    if factor <= 1:
        return mask
    short = -len(mask) % factor
    if short:
        mask = np.concatenate((mask, np.zeros(short, bool)))
    out: Bools = np.any(mask.reshape(-1, factor), axis=1)
    return out


class _Window:
    """The masks of a group's layers in one window, in one unit."""

    def __init__(self, layers: Sequence[Layer], below_size: int, start: int, end: int) -> None:
        self.layers, self.start, self.below_size = layers, start, below_size
        found: list[Masks | None] = []
        for layer in layers:
            limit = min(layer.size, end)
            found.append(layer.masks(start, limit, zeroes=True) if limit > start else None)
        self.unit, wide = unify(layers, found, start, end)
        self.count = (end - start) // self.unit
        self.allocated = [None if m is None else m.allocated for m in wide]
        self.zero = [None if m is None else m.zero for m in wide]
        # Past its end a layer reads as zeroes and hides what is below: allocated zero.
        for index, layer in enumerate(layers):
            if layer.size < end:
                first = max(0, layer.size - start) // self.unit
                mask = self.allocated[index]
                zero = self.zero[index]
                mask = np.zeros(self.count, bool) if mask is None else mask.copy()
                zero = np.zeros(self.count, bool) if zero is None else zero.copy()
                mask[first:] = zero[first:] = True
                self.allocated[index], self.zero[index] = mask, zero

    @property
    def empty(self) -> bool:
        return all(mask is None for mask in self.allocated)

    def traffic(self, target: int, tables: _Tables) -> Traffic:
        """Counts for `layers[target]` as the target; `layers[0]` is the kept image.

        The L2 tables that are written to are noted in `tables`.
        """
        out = Traffic()
        size = self.layers[0].size
        count = min(self.count, max(0, -(-(size - self.start) // self.unit)))
        above: Bools | None = None
        above_data: Bools | None = None
        for mask, zero in zip(self.allocated[:target], self.zero[:target], strict=True):
            if mask is None:
                continue
            data = mask if zero is None else mask & ~zero
            if above is None or above_data is None:
                above, above_data = mask, data
            else:
                above_data = above_data | (data & ~above)
                above = above | mask
        layer = self.layers[target]
        own = self.allocated[target]
        own_zero = self.zero[target]
        written = np.zeros(count, bool)
        if above is not None:
            assert above_data is not None
            unit = commit_granularity(layer)
            dirty = _round_out(above[:count], self.unit, unit)
            # A piece is read and written as data when any of it is data to the guest.
            seen = above_data[:count] | (self._data_below(target)[:count] & ~above[:count])
            copied = dirty & _round_out(seen, self.unit, unit)
            out.commit_bytes = int(np.count_nonzero(copied)) * self.unit
            out.commit_zero_bytes = int(np.count_nonzero(dirty)) * self.unit - out.commit_bytes
            out.extents += _runs(dirty)
            written |= copied
            tables.touch(dirty, self.unit, self.start)
        below: Bools | None = None
        for mask in self.allocated[target + 1 :]:
            if mask is not None:
                below = mask if below is None else below | mask
        if below is not None:
            moved = below[:count].copy()
            if above is not None:
                moved &= ~above[:count]
            if own is not None:
                moved &= ~own[:count]
            # Where the new backing has ended, zero clusters read right without moving.
            ended = max(0, min(count, -(-(self.below_size - self.start) // self.unit)))
            moved[ended:] &= self._data_below(target + 1)[ended:count]
            out.pull_bytes = int(np.count_nonzero(moved)) * self.unit
            out.extents += _runs(moved)
            written |= moved
        has_host = np.zeros(count, bool)
        if own is not None:
            has_host |= own[:count] if own_zero is None else own[:count] & ~own_zero[:count]
        self._growth(out, layer, written, has_host)
        tables.touch(written, self.unit, self.start)
        return out

    def _data_below(self, target: int) -> Bools:
        """Where the group's layers from `target` down show data."""
        seen = np.zeros(self.count, bool)
        hidden = np.zeros(self.count, bool)
        for mask, zero in zip(self.allocated[target:], self.zero[target:], strict=True):
            if mask is not None:
                seen |= (mask if zero is None else mask & ~zero) & ~hidden
                hidden |= mask
        return seen

    def _growth(self, out: Traffic, layer: Layer, written: Bools, has_host: Bools) -> None:
        cluster = 4096 if layer.header is None else layer.header.cluster_size
        touched = _any_of(written, self.unit, cluster)
        had = _any_of(has_host, self.unit, cluster)
        pieces = max(cluster, self.unit) // cluster
        out.new_clusters = int(np.count_nonzero(touched & ~had)) * pieces


class _Tables:
    """Which L2 tables of a target come to be used.

    Held for the whole target, as its L1 is: one table may span many windows.
    """

    def __init__(self, layer: Layer, size: int) -> None:
        self.span = 0
        if isinstance(layer, Qcow2Layer):
            self.span = layer.cluster_size * layer.tables.per_table
            self.touched = np.zeros(-(-size // self.span), bool)
            there = layer.tables.l1[: len(self.touched)] != 0
            self.there = np.zeros(len(self.touched), bool)
            self.there[: len(there)] = there

    def touch(self, written: Bools, unit: int, start: int) -> None:
        """Note what is written into a window: cells of `unit` bytes from guest byte `start`."""
        cells = np.flatnonzero(written)
        if not self.span or not len(cells):
            return
        first = (start + cells * unit) // self.span
        self.touched[first] = True
        for more in range(1, unit // self.span):
            # The cells of a window where little is allocated may cover several tables.
            index = first + more
            self.touched[index[index < len(self.touched)]] = True

    @property
    def new(self) -> int:
        return int(np.count_nonzero(self.touched & ~self.there)) if self.span else 0


def count_traffic(
    layers: Sequence[Layer],
    targets: Sequence[int],
    below_size: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Traffic]:
    """What each target of a group would cost.

    Args:
        layers: the group, kept image first, then downwards.
        targets: indices into `layers`.
        below_size: virtual size of the new backing, 0 where there is none.
    """
    longest = max(layers, key=lambda layer: layer.size)
    size = longest.size
    finest = min(layers, key=lambda layer: layer.granularity)
    spans = list(windows([longest, finest, *layers], 0, size))
    totals = [Traffic() for _ in targets]
    tables = [_Tables(layers[target], layers[0].size) for target in targets]

    def one(span: tuple[int, int]) -> list[Traffic] | None:
        window = _Window(layers, below_size, *span)
        if window.empty:
            return None
        return [window.traffic(*pair) for pair in zip(targets, tables, strict=True)]

    with ThreadPoolExecutor(workers()) as pool:
        for (_, end), found in zip(spans, pool.map(one, spans), strict=True):
            for total, part in zip(totals, found or (), strict=False):
                total.add(part)
            if progress is not None:
                progress(end, size)
    for total, each in zip(totals, tables, strict=True):
        total.new_tables = each.new
    return totals
