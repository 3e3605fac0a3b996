"""The merged image built: clusters brought in, tables written, window by window.

An entry of the result is one of
    as it was      only the target itself decides there (in place)
    unallocated    nobody in the group allocates
    zero           the group says zeroes (compat 0.10: a cluster that is never written to)
    compressed     taken over as it is, where cluster size and type agree
    data           a new cluster: one piece of one file, or put together from several
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.chain.reader import fill
from qchain.chain.resolve import Runs
from qchain.native.clusters import Clusters
from qchain.native.merged import Group, Window, merged_windows
from qchain.native.mover import Dry, Target
from qchain.native.packed import take_over
from qchain.native.tables import Tables
from qchain.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, SUBCLUSTERS, ZERO, Kind

__all__ = ["Builder", "Progress"]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

Progress = Callable[[int, int], None]

_WORTH = 4
"""Clusters are put in the order of their sources where that takes so many times fewer calls."""


@dataclass
class Builder:
    """Builds the map of `group` out of `clusters`.

    Attributes:
        shorter: the target's disk reaches beyond that of the result: its last L2 table is
            written anew, so that nothing is left in it of what lies there.
        compression: of the result; None where its refcounts are too narrow to take over
            compressed clusters, several of which share a host cluster.
    """

    group: Group
    clusters: Clusters
    tables: Tables
    compression: str | None
    progress: Progress | None = None
    shorter: bool = False

    def __post_init__(self) -> None:
        self.extended = self.group.unit != self.group.cluster
        self.target: Target = self.clusters.target
        into = self.group.into
        member = None if into < 0 else self.group.members[into]
        assert member is None or isinstance(member, Qcow2Layer)
        self.member = member
        alike = [
            isinstance(layer, Qcow2Layer)
            and layer.cluster_size == self.group.cluster
            and layer.compression == self.compression
            for layer in self.group.line
        ]
        self._alike = np.array(alike)

    def run(self) -> None:
        """Bring in everything, and write the L2 tables."""
        for window in merged_windows(self.group):
            self._window(window)
            self.clusters.count()
            if self.progress is not None:
                self.progress(min(self._end(window), self.group.size), self.group.size)

    def _end(self, window: Window) -> int:
        return window.start + len(window.kind) * self.group.cluster

    def _window(self, window: Window) -> None:
        count, first = len(window.kind), window.start >> self.clusters.cluster_bits
        changed = window.own & (window.depth != self.group.into)
        if self.member is None:
            entries = np.zeros((count, self.tables.words), np.uint64)
        else:
            entries = self._present(first, count)
        rows = np.flatnonzero(changed.any(axis=1))
        packed = rows[self._packed(window, rows)]
        if len(packed):
            new = take_over(
                self.clusters,
                self.group.line,
                window.depth[packed, 0].astype(np.int64),
                window.host[packed, 0],
            )
            entries[packed] = 0
            entries[packed, 0] = new
            rows = np.setdiff1d(rows, packed, assume_unique=True)
        if len(rows):
            self._rows(window, rows, entries)
        marks = np.zeros(count, bool)
        marks[rows] = True
        marks[packed] = True
        if self.shorter and self._end(window) >= self.group.size:
            marks[-1] = True
        self.tables.put(first, entries, marks)

    def _present(self, first: int, count: int) -> U64:
        """The target's own entries, zeroes beyond its end; shape (count, words)."""
        assert self.member is not None
        out = np.zeros((count, self.tables.words), np.uint64)
        last = min(first + count, self.member.tables.clusters)
        if first < last:
            found = self.member.tables.entries(first, last)
            if found is not None:
                out[: last - first] = found.reshape(-1, self.tables.words)
        return out

    def _packed(self, window: Window, rows: I64) -> Bools:
        """Which of `rows` are one compressed cluster that can be taken over."""
        kind, host, depth = window.kind[rows], window.host[rows], window.depth[rows]
        if self.compression is None:
            return np.zeros(len(rows), bool)
        one = (kind == Kind.COMPRESSED).all(axis=1)
        one &= (host == host[:, :1]).all(axis=1) & (depth == depth[:, :1]).all(axis=1)
        # At the end of the disk the cluster is whole too, but not all of it is there.
        one &= self._alike[depth[:, 0]]
        return np.asarray(one)

    def _rows(self, window: Window, rows: I64, entries: U64) -> None:
        """The clusters that become zeroes, or data put into a new cluster."""
        per = self.group.unit // window.unit
        shape = (len(rows), -1, per)
        own = window.own[rows].reshape(shape)
        zero = window.zero[rows].reshape(shape)
        # Units that hold data; the others are zeroes as a whole, or not the group's.
        data: Bools = np.any(own, axis=2)
        plain: Bools = np.zeros_like(data)
        if self.group.zeroes:
            plain = np.all(zero, axis=2)
            data &= ~plain
        if not self.extended:
            entries[rows[~data[:, 0]], 0] = ZERO
            wanted = rows[data[:, 0]]
            if len(wanted):
                places = self._place(window, wanted, np.ones((len(wanted), 1), bool))
                entries[wanted, 0] = places | np.uint64(COPIED)
            return
        self._extended(window, rows, data, plain, entries)

    def _extended(self, window: Window, rows: I64, data: Bools, plain: Bools, entries: U64) -> None:
        """Entries with subclusters; `data` and `plain` (zeroes) have shape (rows, 32)."""
        first, bitmap = entries[rows, 0], entries[rows, 1]
        home = np.where((first & np.uint64(COMPRESSED)) == 0, first & np.uint64(OFFSET_MASK), 0)
        held = _bits(bitmap, 0) & (home != 0)[:, None]
        per = self.group.unit // window.unit
        depth = window.depth[rows].reshape(len(rows), -1, per)
        stays = (depth == self.group.into).all(axis=2) & held & data
        # Where the target's cluster has room for what comes in, it goes there; what is
        # there in other subclusters stays.
        fits = (home != 0) & ~(held & data & ~stays).any(axis=1)
        comes = np.where(fits[:, None], data & ~stays, data)
        places = np.where(fits, home, 0).astype(np.uint64)
        reused = np.flatnonzero(fits & comes.any(axis=1))
        if len(reused):
            self._fetch(window, rows[reused], comes[reused], home[reused].astype(np.int64), True)
        new = np.flatnonzero(~fits & data.any(axis=1))
        if len(new):
            places[new] = self._place(window, rows[new], comes[new])
        entries[rows, 0] = np.where(places != 0, places | np.uint64(COPIED), np.uint64(0))
        entries[rows, 1] = _word(data) | (_word(plain) << np.uint64(32))

    def _place(self, window: Window, rows: I64, wanted: Bools) -> U64:
        """Give each of `rows` a new cluster and bring its content; the host offsets.

        Args:
            wanted: shape (rows, units): which units are brought.
        """
        ranks = self._order(window, rows, wanted)
        start = self.clusters.take(len(rows))
        places = np.empty(len(rows), np.int64)
        places[ranks] = (start + np.arange(len(rows))) << self.clusters.cluster_bits
        self._fetch(window, rows[ranks], wanted[ranks], places[ranks], False)
        return places.astype(np.uint64)

    def _order(self, window: Window, rows: I64, wanted: Bools) -> I64:
        """The order in which clusters are put: the guest's, unless the sources' is far better."""
        guest = np.arange(len(rows))
        if len(rows) < 2:
            return guest
        depth, host = window.depth[rows, 0], window.host[rows, 0]
        tail = window.host[rows, -1] + np.uint64(window.unit)
        breaks = np.count_nonzero((depth[1:] != depth[:-1]) | (host[1:] != tail[:-1]))
        order = np.lexsort((host, depth))
        depth, host, tail = depth[order], host[order], tail[order]
        fewer = np.count_nonzero((depth[1:] != depth[:-1]) | (host[1:] != tail[:-1]))
        return order if (fewer + 1) * _WORTH < breaks + 1 else guest

    def _fetch(self, window: Window, rows: I64, wanted: Bools, places: I64, again: bool) -> None:
        """Bring the wanted units of `rows` to the host offsets `places`.

        `again`: clusters that were there before, which do not read as zeroes.
        """
        per = self.group.unit // window.unit
        cells = np.repeat(wanted, per, axis=1)
        cell = np.arange(cells.shape[1], dtype=np.int64) * window.unit
        at = (places[:, None] + cell)[cells]
        guest = (window.start + rows[:, None] * self.group.cluster + cell)[cells]
        depth, kind = window.depth[rows][cells], window.kind[rows][cells]
        host = window.host[rows][cells]
        moved = (kind == Kind.DATA) | (kind == Kind.COMPRESSED)
        if again and not moved.all():
            self._clear(at[~moved], window.unit)
        self._move(
            Runs(guest[moved], np.full(int(moved.sum()), window.unit), depth[moved],
                 kind[moved], host[moved]),
            at[moved],
        )  # fmt: skip

    def _clear(self, at: I64, unit: int) -> None:
        breaks = np.flatnonzero(at[1:] != at[:-1] + unit) + 1
        for part in np.split(at, breaks):
            self.target.write(int(part[0]), bytes(len(part) * unit))

    def _move(self, cells: Runs, at: I64) -> None:
        """Join cells of equal length that follow each other on both sides, and bring them."""
        if not len(at):
            return
        unit = int(cells.length[0])
        packed = cells.kind == Kind.COMPRESSED
        follows = np.where(packed[:-1], cells.host[:-1], cells.host[:-1] + np.uint64(unit))
        breaks = (cells.depth[1:] != cells.depth[:-1]) | (cells.kind[1:] != cells.kind[:-1])
        breaks |= (cells.host[1:] != follows) | (at[1:] != at[:-1] + unit)
        breaks |= packed[1:] & (cells.start[1:] != cells.start[:-1] + unit)
        first = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        length = np.diff(np.append(first, len(at))) * unit
        line: Sequence[Layer] = self.group.line
        plain = cells.kind[first] == Kind.DATA
        if isinstance(self.target, Dry):
            self.target.count(int(length[plain].sum()), int(length[~plain].sum()), len(first))
            return
        for depth, host, offset, count in zip(
            cells.depth[first[plain]].tolist(),
            cells.host[first[plain]].tolist(),
            at[first[plain]].tolist(),
            length[plain].tolist(),
            strict=True,
        ):
            self.target.bring(line[depth].data, host, offset, count)
        for index in np.flatnonzero(~plain).tolist():
            self._unpack(cells, int(first[index]), int(length[index]), int(at[first[index]]))

    def _unpack(self, cells: Runs, index: int, length: int, offset: int) -> None:
        one = slice(index, index + 1)
        table = Runs(
            cells.start[one],
            np.array([length], np.int64),
            cells.depth[one],
            cells.kind[one],
            cells.host[one],
        )
        buffer = memoryview(bytearray(length))
        fill(self.group.line, table, buffer, np.zeros(1, np.int64))
        self.target.write(offset, buffer)


def _bits(words: U64, shift: int) -> Bools:
    """Bits `shift`..`shift`+31 of each word; shape (n, 32)."""
    places = np.arange(SUBCLUSTERS, dtype=np.uint64) + np.uint64(shift)
    return ((words[:, None] >> places) & np.uint64(1)).astype(bool)


def _word(bits: Bools) -> U64:
    """The inverse of `_bits`, as the low 32 bits."""
    places = np.arange(SUBCLUSTERS, dtype=np.uint64)
    return np.asarray((bits.astype(np.uint64) << places).sum(axis=1, dtype=np.uint64))
