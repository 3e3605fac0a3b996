"""What moves: bytes read and written by every way of merging a group, counted from the maps.

For a group F(i)..F(j) (j kept) and a target t, per cell in the finest unit:

    commit into t    A(t+1) ∪ … ∪ A(j), rounded out to qemu's granularity
    pull into t      (A(i) ∪ … ∪ A(t-1)) \\ (A(t) ∪ what the commit wrote)

All targets are counted in one pass over the maps. `tests/test_plan_traced.py` holds the
figures against what qemu-img requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer, Masks, Qcow2Layer
from qchain.chain.ownership import unify
from qchain.chain.parallel import thread_pool
from qchain.chain.resolve import mask_windows
from qchain.plan.clusters import ClusterCount
from qchain.plan.zeroes import View, view_of
from qchain.qcow2.header_limits import MAX_L1_BYTES

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
        pull_read_bytes: what it reads for that: the old view and the new one of what lies
            between, as far as their files reach; without a new backing the old view of all
            that the target does not allocate, holes included.
        extents: contiguous runs of both.
        new_clusters: clusters of the target that get data and had none.
        new_tables: L2 tables of the target that come into being, for zero writes too.
        copy_bytes: of a copy: data that is copied before it is pulled into.
    """

    commit_bytes: int = 0
    commit_zero_bytes: int = 0
    pull_bytes: int = 0
    pull_read_bytes: int = 0
    extents: int = 0
    new_clusters: int = 0
    new_tables: int = 0
    copy_bytes: int = 0

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
    if to <= unit:
        return mask
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

    def __init__(
        self, layers: Sequence[Layer], under: Sequence[Layer], start: int, end: int
    ) -> None:
        self.layers, self.under, self.start, self.end = layers, under, start, end
        self.view: View | None = None
        found: list[Masks | None] = []
        for layer in layers:
            limit = min(layer.size, end)
            found.append(layer.masks(start, limit, zeroes=True) if limit > start else None)
        self.packed = [m is not None and m.packed for m in found]
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
        # What is beyond the kept image's end does not move.
        self.count = min(self.count, max(0, -(-(layers[0].size - start) // self.unit)))
        self.cells = [
            _Shown(_cut(mask, self.count), _cut(zero, self.count))
            for mask, zero in zip(self.allocated, self.zero, strict=True)
        ]

    @property
    def empty(self) -> bool:
        return all(mask is None for mask in self.allocated)

    def traffic(
        self,
        targets: Sequence[int],
        tables: Sequence[_Tables],
        clusters: Sequence[ClusterCount],
    ) -> list[Traffic]:
        """Counts for each target (a layer index; 0 is the kept image).

        The L2 tables that are written to are noted in `tables`. Unions grow from layer to
        layer, downwards and upwards, so that the work is linear in the depth.
        """
        below = [_NOTHING]
        for shown in reversed(self.cells):
            below.append(shown.over(below[-1]))
        below.reverse()  # below[k]: the layers from k down
        wanted = {target: place for place, target in enumerate(targets)}
        out = [Traffic() for _ in targets]
        above = _NOTHING
        for target, own in enumerate(self.cells):
            down = above.over(own)
            if target in wanted:
                place = wanted[target]
                out[place] = self._one(
                    target, above, down, own, below[target + 1], tables[place],
                    clusters[place] if clusters else None,
                )  # fmt: skip
            above = down
        return out

    def _one(
        self,
        target: int,
        above: _Shown,
        down: _Shown,
        own: _Shown,
        below: _Shown,
        tables: _Tables,
        clusters: ClusterCount | None,
    ) -> Traffic:
        """One target: what is above it, that and its own, its own, and what is below it."""
        out = Traffic()
        layer = self.layers[target]
        has_host = own.data
        dirty = copied = moved = None
        if above.mask is not None:
            unit = commit_granularity(layer)
            dirty = copied = _round_out(above.mask, self.unit, unit)
            out.commit_bytes = int(np.count_nonzero(dirty)) * self.unit
            if above.zero is not None:
                copied, out.commit_bytes = self._copied(layer, dirty, unit)
            out.commit_zero_bytes = int(np.count_nonzero(dirty)) * self.unit - out.commit_bytes
            out.extents += _runs(dirty)
        if dirty is not None:
            # Of a (sub)cluster that was partly written the rest comes along.
            there = _union(down.mask, _round_out(dirty, self.unit, layer.granularity))
        else:
            there = down.mask
        if target + 1 < len(self.layers):
            moved = self._pull(target, there, below, out)
        written = _union(copied, moved)
        if written is not None:
            out.new_clusters = self._new_clusters(layer, written, has_host)
            touched = _union(dirty, moved)
            assert touched is not None
            tables.touch(touched, self.unit, self.start)
            if clusters is not None:
                host = None
                if own.zero is None and not self.packed[target]:
                    host = np.zeros(0, bool) if own.mask is None else own.mask
                clusters.note(self.start, self.unit, copied, dirty, moved, host)
        return out

    def _copied(self, target: Layer, dirty: Bools, piece: int) -> tuple[Bools, int]:
        """What a commit into `target` copies of what is dirty; the rest is written as zeroes."""
        if self.view is None:
            self.view = view_of([*self.layers, *self.under], self.start, self.end)
        cluster = piece if target.header is None else target.header.cluster_size
        return self.view.copied(dirty, self.unit, piece, cluster)

    def _pull(self, target: int, there: Bools | None, below: _Shown, out: Traffic) -> Bools | None:
        """What the pull into `target` moves; it allocates `there` by then."""
        moved = None
        if below.mask is not None:
            moved = below.mask if there is None else below.mask > there
        old_size = self.layers[target + 1].size
        if not self.under:
            left = np.ones(self.count, bool) if there is None else ~there
            out.pull_read_bytes = self._before(left, old_size)
        elif moved is not None:
            out.pull_read_bytes = self._before(moved, old_size)
            out.pull_read_bytes += self._before(moved, self.under[0].size)
        if moved is None:
            return None
        # Where the new backing has ended, zero clusters read right without moving.
        below_size = self.under[0].size if self.under else 0
        ended = max(0, min(self.count, -(-(below_size - self.start) // self.unit)))
        if ended < self.count and below.zero is not None:
            assert below.data is not None
            moved = np.concatenate((moved[:ended], moved[ended:] & below.data[ended:]))
        out.pull_bytes = int(np.count_nonzero(moved)) * self.unit
        out.extents += _runs(moved)
        return moved

    def _before(self, mask: Bools, size: int) -> int:
        """Bytes of the set cells that lie before guest byte `size`, or the group's end."""
        size = min(size, self.layers[0].size)
        left = max(0, size - self.start)
        whole = left // self.unit
        if whole >= len(mask):
            return int(np.count_nonzero(mask)) * self.unit
        return int(np.count_nonzero(mask[:whole])) * self.unit + int(mask[whole]) * (
            left % self.unit
        )

    def _new_clusters(self, layer: Layer, written: Bools, has_host: Bools | None) -> int:
        cluster = 4096 if layer.header is None else layer.header.cluster_size
        pieces = max(cluster, self.unit) // cluster
        touched = _any_of(written, self.unit, cluster)
        if has_host is not None:
            touched = touched > _any_of(has_host, self.unit, cluster)
        return int(np.count_nonzero(touched)) * pieces


def _cut(mask: Bools | None, count: int) -> Bools | None:
    return None if mask is None else mask[:count]


def _union(a: Bools | None, b: Bools | None) -> Bools | None:
    if a is None or a is b:
        return b
    return a if b is None else a | b


class _Shown:
    """What some layers, seen from above, allocate: `mask`, and which of it reads zero.

    Both of shape (cells,); `mask` None: nothing at all; `zero` None: all of it is data.
    """

    __slots__ = ("mask", "zero")

    def __init__(self, mask: Bools | None, zero: Bools | None) -> None:
        self.mask, self.zero = mask, zero

    @property
    def data(self) -> Bools | None:
        """What shows data."""
        if self.mask is None or self.zero is None:
            return self.mask
        return self.mask > self.zero

    def over(self, lower: _Shown) -> _Shown:
        """These layers and, below them, those of `lower`."""
        if self.mask is None:
            return lower
        if lower.mask is None:
            return self
        zero = self.zero
        if lower.zero is not None:
            zero = _union(zero, lower.zero > self.mask)
        return _Shown(self.mask | lower.mask, zero)


_NOTHING = _Shown(None, None)


class _Tables:
    """Which L2 tables of a target come to be used.

    Held for the whole target, as its L1 is: one table may span many windows.
    """

    def __init__(self, layer: Layer, size: int) -> None:
        self.span = 0
        if isinstance(layer, Qcow2Layer):
            self.span = layer.cluster_size * layer.tables.per_table
            # No table is larger, whatever the kept image announces.
            count = min(-(-size // self.span), MAX_L1_BYTES // 8)
            self.touched = np.zeros(count, bool)
            there = layer.tables.l1[: len(self.touched)] != 0
            self.there = np.zeros(len(self.touched), bool)
            self.there[: len(there)] = there

    def touch(self, written: Bools, unit: int, start: int) -> None:
        """Note what is written into a window: cells of `unit` bytes from guest byte `start`."""
        if not self.span:
            return
        low, high = start // self.span, (start + len(written) * unit - 1) // self.span + 1
        if high <= len(self.there) and self.there[low:high].all():
            return  # the usual case, and the rest is slow
        cells = np.flatnonzero(written)
        if not len(cells):
            return
        first = (start + cells * unit) // self.span
        first = first[first < len(self.touched)]
        self.touched[first] = True
        tables = unit // self.span
        if tables > 1:
            # The cells of a window where little is allocated may cover several tables, and
            # then they are few.
            for index in first.tolist():
                self.touched[index : index + tables] = True

    @property
    def new(self) -> int:
        return int(np.count_nonzero(self.touched & ~self.there)) if self.span else 0


def count_traffic(
    layers: Sequence[Layer],
    targets: Sequence[int],
    under: Sequence[Layer] = (),
    progress: Callable[[int, int], None] | None = None,
    clusters: Sequence[ClusterCount] = (),
) -> list[Traffic]:
    """What each target of a group would cost.

    Args:
        layers: the group, kept image first, then downwards.
        targets: indices into `layers`.
        under: what lies below the group, the new backing first; nothing where it is dropped.
        clusters: one for each target, gets what it needs.
    """
    longest = max(layers, key=lambda layer: layer.size)
    size = longest.size
    finest = min(layers, key=lambda layer: layer.granularity)
    spans = list(mask_windows([longest, finest, *layers, *under], 0, size))
    totals = [Traffic() for _ in targets]
    tables = [_Tables(layers[target], layers[0].size) for target in targets]

    def one(span: tuple[int, int]) -> list[Traffic] | None:
        window = _Window(layers, under, *span)
        if not window.count or (window.empty and under):
            return None
        return window.traffic(targets, tables, clusters)

    with thread_pool() as pool:
        for (_, end), found in zip(spans, pool.map(one, spans), strict=True):
            for total, part in zip(totals, found or (), strict=False):
                total.add(part)
            if progress is not None:
                progress(end, size)
    for total, each in zip(totals, tables, strict=True):
        total.new_tables = each.new
    for count, each in zip(clusters, tables, strict=False):
        if each.span:
            count.touched, count.there = each.touched, each.there
    return totals
