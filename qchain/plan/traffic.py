"""What moves: bytes read and written by every way of merging a group, counted from the maps.

For a group F(i)..F(j) (j kept) and a target t, per cell in the finest unit:

    commit into t    A(t+1) ∪ … ∪ A(j), rounded out to qemu's granularity
    pull into t      (A(i) ∪ … ∪ A(t-1)) \\ (A(t) ∪ what the commit wrote)

All targets are counted in one pass over the maps. What a pull does where the target's clusters
are larger than what is pulled depends on the contents (`qchain.plan.walk`): a second pass
looks at them there if they are few, and everywhere if it is asked to.
`tests/test_plan_traced.py` holds the figures against what qemu-img requests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from qchain.chain.layer import Layer, Masks, Qcow2Layer
from qchain.chain.ownership import unify
from qchain.chain.parallel import thread_pool
from qchain.chain.reader import require_content
from qchain.chain.resolve import ALIGNMENT, mask_windows, windows
from qchain.errors import ImageError
from qchain.plan.amounts import Traffic
from qchain.plan.cells import (
    NOTHING,
    Bools,
    Shown,
    any_of,
    cut,
    in_parts,
    round_out,
    runs_in,
    union,
)
from qchain.plan.clusters import ClusterCount
from qchain.plan.exact import LONG, REACH, Pulled, looked_at
from qchain.plan.newtables import NewTables
from qchain.plan.pieces import finest_below
from qchain.plan.versions import DEFAULT, Behaviour
from qchain.plan.walk import STEP, Ranges
from qchain.plan.zeroes import BATCH, View, view_of

__all__ = ["Traffic", "commit_granularity", "count_traffic"]

_FEW = 64 << 20
"""So many bytes, of all targets together, are read even without `exact`."""
_EXACT_CELLS = 1 << 15
_EXACT_BYTES = 256 << 20
"""Of a window whose contents are compared, the most."""
_MANY = 1 << 22
_FAR = 1 << 30


def commit_granularity(target: Layer) -> int:
    """The unit of a commit into `target`: its cluster size between 4K and 64K, raw 64K.

    Source: qemu's `bdrv_get_default_bitmap_granularity`.
    """
    if target.header is None:
        return 65536
    return min(max(target.header.cluster_size, 4096), 65536)


class _Window:
    """The masks of a group's layers in one window, in one unit."""

    def __init__(
        self,
        layers: Sequence[Layer],
        under: Sequence[Layer],
        start: int,
        end: int,
        behaviour: Behaviour = DEFAULT,
        most: int = 1 << 62,
    ) -> None:
        """`most`: bytes of a cell, unless little is allocated and there would be too many."""
        self.layers, self.under, self.start, self.end = layers, under, start, end
        self.behaviour = behaviour
        self.view: View | None = None
        self.closely: Mapping[int, Pulled] = {}
        self._shown_under: _Window | None = None
        self._around: tuple[_Window, Iterator[tuple[int, Shown, Shown, Shown]]] | None = None
        found: list[Masks | None] = []
        for layer in layers:
            limit = min(layer.size, end)
            found.append(layer.masks(start, limit, zeroes=True) if limit > start else None)
        self.packed = [m is not None and m.packed for m in found]
        self.finest = finest_below(layers, found, start, end, REACH)
        self.unit, wide = unify(layers, found, start, end)
        parts = self.unit // min(self.unit, most)
        if (end - start) // (self.unit // parts) > _MANY:
            parts = 1
        self.unit //= parts
        self.count = (end - start) // self.unit
        self.allocated = [None if m is None else in_parts(m.allocated, parts) for m in wide]
        self.zero = [None if m is None or m.zero is None else in_parts(m.zero, parts) for m in wide]
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
            Shown(cut(mask, self.count), cut(zero, self.count))
            for mask, zero in zip(self.allocated, self.zero, strict=True)
        ]

    def regions(self, targets: Collection[int]) -> dict[int, tuple[Bools, Bools | None]]:
        """`left_and_moved` of the targets that are pulled into."""
        return {
            target: self.left_and_moved(target, above, own, below)
            for target, above, own, below in self.sides()
            if target in targets and target + 1 < len(self.layers)
        }

    @property
    def empty(self) -> bool:
        return all(mask is None for mask in self.allocated)

    def traffic(
        self,
        targets: Sequence[int],
        tables: Sequence[NewTables],
        clusters: Sequence[ClusterCount],
    ) -> list[Traffic]:
        """Counts for each target (a layer index; 0 is the kept image).

        The L2 tables that are written to are noted in `tables`.
        """
        wanted = {target: place for place, target in enumerate(targets)}
        out = [Traffic() for _ in targets]
        for target, above, own, below in self.sides():
            if target in wanted:
                place = wanted[target]
                count = clusters[place] if clusters else None
                found = self._one(target, above, own, below, tables[place], count)
                if own.mask is not None:
                    shown = own.mask if above.mask is None else own.mask > above.mask
                    found.held_bytes = int(np.count_nonzero(own.mask)) * self.unit
                    found.shown_bytes = int(np.count_nonzero(shown)) * self.unit
                if target == 0:
                    data = (own if self.under else own.over(below)).data
                    if data is not None:
                        found.copy_bytes = self._before(data, self.layers[0].size)
                out[place] = found
        return out

    def sides(self) -> Iterator[tuple[int, Shown, Shown, Shown]]:
        """Per layer what is above it, its own, and what is below it, within the group.

        Unions grow from layer to layer, downwards and upwards, so that the work is linear in
        the depth.
        """
        below = [NOTHING]
        for shown in reversed(self.cells):
            below.append(shown.over(below[-1]))
        below.reverse()  # below[k]: the layers from k down
        above = NOTHING
        for target, own in enumerate(self.cells):
            yield target, above, own, below[target + 1]
            above = above.over(own)

    def left_and_moved(
        self, target: int, above: Shown, own: Shown, below: Shown
    ) -> tuple[Bools, Bools | None]:
        """What the target does not allocate after the commit; what of it lies between."""
        layer = self.layers[target]
        there = union(self._own_then(target, own), above.mask)
        if above.mask is not None:
            # Of a (sub)cluster that was partly written the rest comes along.
            dirty = round_out(above.mask, self.unit, commit_granularity(layer))
            there = union(there, round_out(dirty, self.unit, layer.granularity))
        left = np.ones(self.count, bool) if there is None else ~there
        return left, None if below.mask is None else below.mask & left

    def _own_then(self, target: int, own: Shown) -> Bools | None:
        """What the target has when it is pulled into: by then it is as long as the kept image.

        What it grew by is zero clusters if its backing file reaches there, else it is left
        unallocated (qemu's `bdrv_co_truncate`).
        """
        layer = self.layers[target]
        if own.mask is None or layer.size >= min(self.layers[0].size, self.end):
            return own.mask
        mask = own.mask.copy()
        grown = max(0, layer.size - self.start) // self.unit
        piece = max(1, layer.granularity // self.unit)
        first, last = grown // piece * piece, -(-grown // piece) * piece
        if self.layers[target + 1 :] and self.layers[target + 1].size > layer.size:
            mask[first:] = True
        else:
            mask[last:] = False
            mask[grown:last] = bool(grown) and grown < last and mask[grown - 1]
        return mask

    def _one(
        self,
        target: int,
        above: Shown,
        own: Shown,
        below: Shown,
        tables: NewTables,
        clusters: ClusterCount | None,
    ) -> Traffic:
        """One target: what is above it, its own, and what is below it."""
        out = Traffic()
        layer = self.layers[target]
        has_host = own.data
        dirty = copied = moved = touched = None
        if above.mask is not None:
            unit = commit_granularity(layer)
            dirty = copied = round_out(above.mask, self.unit, unit)
            out.commit_bytes = int(np.count_nonzero(dirty)) * self.unit
            if above.zero is not None:
                copied, out.commit_bytes = self._copied(target, dirty, unit)
            out.commit_zero_bytes = int(np.count_nonzero(dirty)) * self.unit - out.commit_bytes
            out.extents += runs_in(dirty)
        if target + 1 < len(self.layers):
            left, between = self.left_and_moved(target, above, own, below)
            moved, touched = self._pull(target, left, between, below, out)
        written = union(copied, moved)
        if written is not None:
            out.new_clusters = self._new_clusters(layer, written, has_host)
        touched = union(dirty, touched)
        if touched is not None:
            tables.touch(touched, self.unit, self.start)
            if clusters is not None:
                host = None
                if own.zero is None and not self.packed[target]:
                    host = np.zeros(0, bool) if own.mask is None else own.mask
                clusters.note(self.start, self.unit, copied, dirty, moved, host)
        return out

    def _copied(self, target: int, dirty: Bools, piece: int) -> tuple[Bools, int]:
        """What a commit into `target` copies of what is dirty; the rest is written as zeroes."""
        header = self.layers[target].header
        cluster = piece if header is None else header.cluster_size
        span = self.start, self.start + self.count * self.unit
        if cluster <= piece or self.end - self.start > LONG:
            return self._seen().copied(dirty, self.unit, piece, cluster, self.start, span)
        # Whether zeroes are copied depends on where their extent begins and ends, out there.
        if self._around is None:
            low, high = max(0, self.start - BATCH), self.end + BATCH
            around = _Window(self.layers, self.under, low, high, most=ALIGNMENT)
            self._around = around, around.sides()
        around, sides = self._around
        mask = next(above.mask for number, above, _, _ in sides if number == target)
        assert mask is not None
        dirty = round_out(mask, around.unit, piece)
        origin = around._origin(target, piece) if dirty[0] else around.start
        copied, amount = around._seen().copied(dirty, around.unit, piece, cluster, origin, span)
        copied = copied[(self.start - around.start) // around.unit :]
        if around.unit > self.unit:
            copied = np.repeat(copied, around.unit // self.unit)
        return any_of(copied, around.unit, self.unit)[: self.count], amount

    def _seen(self) -> View:
        """The view of the kept point."""
        if self.view is None:
            self.view = view_of([*self.layers, *self.under], self.start, self.end)
        return self.view

    def _origin(self, target: int, piece: int) -> int:
        """Where the run of dirty pieces began that reaches into the window, if not too far away."""
        position = self.start
        while max(0, self.start - _FAR) < position:
            low = max(0, position - REACH)
            window = _Window(self.layers[:target], (), low, position)
            masks = [cells.mask for cells in window.cells if cells.mask is not None]
            if not masks:
                break
            dirty = round_out(np.logical_or.reduce(masks), window.unit, piece)
            if not dirty.all():
                return position - int(np.argmin(dirty[::-1])) * window.unit
            position = low
        return position

    def _pull(
        self, target: int, left: Bools, moved: Bools | None, below: Shown, out: Traffic
    ) -> tuple[Bools | None, Bools | None]:
        """What the pull into `target` writes as data, and what it writes at all.

        Args:
            left: what the target does not allocate by then.
            moved: what of that the layers between do, which `below` shows.
        """
        if target in self.closely:
            return self._closely(target, self.closely[target], out)
        layer, old_size = self.layers[target], self.layers[target + 1].size
        new_size = self.under[0].size if self.under else 0
        unsure = aligns = False
        if not self.under:
            out.pull_read_bytes = self._before(left, old_size)
        elif moved is not None:
            aligns = self.behaviour.rebase_aligns
            reach = self.start - (REACH if new_size % layer.granularity else 0)
            outreaches = reach < new_size < min(self.end, self.layers[0].size)
            unsure = self.finest[target] < layer.granularity or outreaches
            if aligns:
                moved = round_out(moved, self.unit, layer.granularity)
            out.pull_read_bytes = self._before(moved, old_size) + self._before(moved, new_size)
            if unsure and not aligns:
                out.unsure_bytes = int(np.count_nonzero(moved)) * self.unit
                again = min(old_size, new_size + STEP) if outreaches else new_size
                out.pull_read_bytes += max(
                    0, self._before(moved, again) - self._before(moved, new_size)
                )
        if moved is None:
            return None, None
        moved, equal = self._differing(moved, below, old_size)
        if aligns or (self.behaviour.rebase_aligns and not self.under):
            moved, equal = round_out(moved, self.unit, layer.granularity) & left, 0
        out.pull_bytes = self._before(moved, old_size) - equal
        data = self._as_data(layer, moved, old_size)
        out.extents += runs_in(data)
        return data, moved

    def _differing(self, moved: Bools, below: Shown, old_size: int) -> tuple[Bools, int]:
        """`moved` without the cells that read as zeroes before and after, by the maps.

        And how many bytes before `old_size` of the others do, where the new backing has
        smaller cells.
        """
        if below.zero is None:
            return moved, 0
        zero = moved & below.zero
        if not self.under or not zero.any():
            return moved & ~zero, 0
        if self._shown_under is None:
            self._shown_under = _Window(self.under, (), self.start, self.end)
        window, shown = self._shown_under, NOTHING
        for cells in reversed(window.cells):
            shown = cells.over(shown)
        data = shown.data
        if data is None:
            return moved & ~zero, 0
        unit = min(self.unit, window.unit)
        both = np.repeat(zero, self.unit // unit)
        shows = np.repeat(data, window.unit // unit)[: len(both)]
        both[: len(shows)] &= ~shows
        whole = np.asarray(both.reshape(-1, self.unit // unit).all(axis=1))
        inside = max(0, old_size - self.start) // self.unit
        some = both.reshape(-1, self.unit // unit)[:inside]
        apart = int(np.count_nonzero(some)) * unit
        apart -= int(np.count_nonzero(whole[:inside])) * self.unit
        return moved & ~whole, apart

    def _as_data(self, layer: Layer, written: Bools, old_size: int) -> Bools:
        """What of `written` gets data clusters: beyond `old_size` rebase writes zeroes."""
        if old_size >= min(self.end, self.layers[0].size):
            return written
        if isinstance(layer, Qcow2Layer) and layer.version < 3:
            return written  # it has no zero clusters
        # Of a (sub)cluster that is zeroed in part the rest is copied.
        last = max(0, -(-old_size // layer.granularity) * layer.granularity - self.start)
        out = written.copy()
        out[-(-last // self.unit) :] = False
        return out

    def _closely(self, target: int, pulled: Pulled, out: Traffic) -> tuple[Bools, Bools]:
        """What the contents say of the pull."""
        out.pull_read_bytes, out.pull_bytes = pulled.read, pulled.written
        data = self._cells_of(pulled.data)
        touched = data | self._cells_of(pulled.zeroes)
        data = self._as_data(self.layers[target], touched, self.layers[target + 1].size)
        out.extents += runs_in(data)
        return data, touched

    def _cells_of(self, ranges: Ranges) -> Bools:
        """The cells that the ranges touch."""
        steps = np.zeros(self.count + 1, np.int64)
        np.add.at(steps, (ranges.start - self.start) // self.unit, 1)
        np.add.at(steps, -((self.start - ranges.end) // self.unit), -1)
        return np.asarray(np.cumsum(steps[:-1]) > 0)

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
        touched = any_of(written, self.unit, cluster)
        if has_host is not None:
            touched = touched > any_of(has_host, self.unit, cluster)
        return int(np.count_nonzero(touched)) * pieces


def count_traffic(
    layers: Sequence[Layer],
    targets: Sequence[int],
    under: Sequence[Layer] = (),
    progress: Callable[[int, int], None] | None = None,
    clusters: Sequence[ClusterCount] = (),
    *,
    exact: bool = False,
    behaviour: Behaviour = DEFAULT,
) -> list[Traffic]:
    """What each target of a group would cost.

    Args:
        layers: the group, kept image first, then downwards.
        targets: indices into `layers`.
        under: what lies below the group, the new backing first; nothing where it is dropped.
        clusters: one for each target, gets what it needs.
        exact: compare the contents of all that a pull would move.

    Raises: `ImageError` when the contents cannot be read, with `exact` only.
    """
    longest = max(layers, key=lambda layer: layer.size)
    size = longest.size
    finest = min(layers, key=lambda layer: layer.granularity)
    order = [longest, finest, *layers, *under]
    cells = max(1, min(_EXACT_CELLS, _EXACT_BYTES // finest.granularity))
    spans = list(windows(order, 0, size, cells) if exact else mask_windows(order, 0, size))
    totals = [Traffic() for _ in targets]
    tables = [NewTables(layers[target], layers[0].size) for target in targets]
    if exact:
        require_content([*layers, *under])

    def one(span: tuple[int, int], closely: bool = exact) -> list[Traffic] | None:
        most = finest.granularity if closely else 1 << 62
        window = _Window(layers, under, *span, behaviour, most)
        if not window.count or (window.empty and under):
            return None
        if closely and not window.empty:
            window.closely = looked_at(
                lambda low: _Window(layers, under, low, span[1], behaviour), targets, span
            )
        return window.traffic(targets, tables, clusters if closely is exact else ())

    unsure: list[tuple[tuple[int, int], list[Traffic]]] = []
    with thread_pool() as pool:
        for span, found in zip(spans, pool.map(one, spans), strict=True):
            for total, part in zip(totals, found or (), strict=False):
                total.add(part)
            if found and any(part.unsure_bytes for part in found):
                unsure.append((span, found))
            if progress is not None:
                progress(span[1], size)
        if 0 < sum(total.unsure_bytes for total in totals) <= _FEW:
            # What cannot be read is found out elsewhere, and said there.
            with contextlib.suppress(ImageError):
                require_content([*layers, *under])
                again = list(pool.map(lambda each: one(each[0], True), unsure))
                for (_, before), now in zip(unsure, again, strict=True):
                    for total, old, new in zip(totals, before, now or (), strict=False):
                        total.add(old, -1)
                        total.add(new)
    for total, each in zip(totals, tables, strict=True):
        total.new_tables = each.new
    for count, each in zip(clusters, tables, strict=False):
        if each.span:
            count.touched, count.there = each.touched, each.there
    return totals
