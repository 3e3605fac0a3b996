"""What one rebase requests, from the pieces that qemu's block status gives it.

qemu 7.2 goes through the image piece by piece: what the image does not allocate and a layer
between it and the new backing does, as far as one status reaches, at most 2 MiB at once. It
reads both views of the piece and writes the sectors that differ. A write makes the whole
(sub)cluster of the image allocated, so that what follows in it is passed over:

image      |-------- cluster -------|-------- cluster -------|
pieces     ....[--1--][--2--].[---------3--------][----4----].
differ            xx    xx          xx    xx          xx
written           ==                      ==                       (in 3: the second cluster)
passed over           ////////////                ///////////

Source: the loop of `img_rebase`, and the trace of 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["STEP", "Ranges", "Walk", "cover", "ranges_of", "walk"]

I64 = npt.NDArray[np.int64]

STEP = 2 << 20
"""Bytes that rebase looks at in one go at most."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """Disjoint guest ranges in order, [start, end) in bytes; arrays of shape (n,)."""

    start: I64
    end: I64

    def __len__(self) -> int:
        return len(self.start)

    @property
    def total(self) -> int:
        return int((self.end - self.start).sum())

    def below(self, points: I64) -> I64:
        """How many bytes of the ranges lie before each of `points`."""
        if not len(self):
            return np.zeros(len(points), np.int64)
        sums = np.concatenate((np.zeros(1, np.int64), np.cumsum(self.end - self.start)))
        index = np.searchsorted(self.start, points, "right")
        last = np.maximum(index - 1, 0)
        beyond = np.where(index > 0, np.maximum(self.end[last] - points, 0), 0)
        return np.asarray(sums[index] - beyond)

    def within(self, other: Ranges) -> int:
        """Bytes that both cover."""
        return int((self.below(other.end) - self.below(other.start)).sum())

    def cut_at(self, points: I64) -> Ranges:
        """The same bytes, no range across any of `points` (in order)."""
        index = np.searchsorted(self.start, points, "right") - 1
        inside = index >= 0
        inside[inside] = (self.end[index[inside]] > points[inside]) & (
            self.start[index[inside]] < points[inside]
        )
        points = points[inside]
        return Ranges(
            np.sort(np.concatenate((self.start, points))),
            np.sort(np.concatenate((self.end, points))),
        )

    def clip(self, start: int, end: int) -> Ranges:
        """What of them lies in [start, end)."""
        low, high = np.maximum(self.start, start), np.minimum(self.end, end)
        keep = low < high
        return Ranges(low[keep], high[keep])

    def both(self, other: Ranges) -> Ranges:
        """What both cover, cut where either is."""
        first = np.searchsorted(other.end, self.start, "right")
        last = np.searchsorted(other.start, self.end, "left")
        counts = np.maximum(last - first, 0)
        mine = np.repeat(np.arange(len(self)), counts)
        shift = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        theirs = np.repeat(first, counts) + shift
        return Ranges(
            np.maximum(self.start[mine], other.start[theirs]),
            np.minimum(self.end[mine], other.end[theirs]),
        )

    def without(self, other: Ranges) -> Ranges:
        """What `other` does not cover."""
        start = np.concatenate((np.array([-1], np.int64), other.end))
        end = np.concatenate((other.start, np.array([1 << 62], np.int64)))
        keep = start < end
        return self.both(Ranges(start[keep], end[keep]))


def ranges_of(mask: npt.NDArray[np.bool_], breaks: npt.NDArray[np.bool_] | None, unit: int,
              start: int) -> Ranges:  # fmt: skip
    """The runs of set cells of `unit` bytes from guest byte `start` on, cut before each break."""
    before = np.concatenate((np.zeros(1, bool), mask[:-1]))
    first = mask & ~before if breaks is None else mask & (breaks | ~before)
    # A run ends before a clear cell, before the next run and at the end.
    ends = np.concatenate(((~mask | first)[1:], np.ones(1, bool))) & mask
    return Ranges(
        start + np.flatnonzero(first).astype(np.int64) * unit,
        start + (np.flatnonzero(ends).astype(np.int64) + 1) * unit,
    )


def cover(ranges: Ranges, cluster: int) -> Ranges:
    """Whole clusters around the ranges, joined where they touch."""
    low, high = ranges.start // cluster * cluster, -(-ranges.end // cluster) * cluster
    if not len(low):
        return ranges
    apart = low[1:] > high[:-1]
    return Ranges(low[np.concatenate(([True], apart))], high[np.concatenate((apart, [True]))])


@dataclass(frozen=True, slots=True)
class Walk:
    """What a rebase reads (both views, bytes) and writes (what differs, zeroes included)."""

    old_read: Ranges
    new_read: Ranges
    read_again: Ranges
    differs: Ranges


def walk(pieces: Ranges, differs: Ranges, cluster: int, old_size: int, new_size: int) -> Walk:
    """The requests of 7.2 for these pieces.

    Args:
        pieces: as block status gives them, the 2 MiB apart.
        differs: what differs, all within the pieces.
        cluster: bytes that one write of the image makes allocated, its (sub)cluster.
        old_size, new_size: where the immediate backing and the new one end; a piece is cut
            there, at the latter after the old view has been read for all of it.
    """
    pieces = pieces.cut_at(np.array([old_size], np.int64))
    whole = pieces
    pieces = pieces.cut_at(np.array([new_size], np.int64))
    steps = _steps(pieces, differs, cluster)
    pieces = pieces.cut_at(np.sort(np.array(steps, np.int64)))
    passed = _passed_over(pieces, differs, cluster)
    read = pieces.without(passed)
    again = _read_again(whole, differs, steps, cluster, new_size)
    return Walk(
        read.clip(0, old_size),
        read.clip(0, new_size),
        again.clip(0, old_size),
        differs.without(passed),
    )


def _hit(differs: Ranges, cluster: int, point: int) -> bool:
    """Whether, when the walk is at `point`, the cluster around it was written to."""
    low = point // cluster * cluster
    index = int(np.searchsorted(differs.end, low, "right"))
    return index < len(differs) and int(differs.start[index]) < point


def _steps(pieces: Ranges, differs: Ranges, cluster: int) -> list[int]:
    """Where pieces longer than 2 MiB are cut within a cluster."""
    long = np.flatnonzero((pieces.end - pieces.start > STEP) & (pieces.start % cluster != 0))
    out = []
    for start, end in zip(pieces.start[long].tolist(), pieces.end[long].tolist(), strict=True):
        point = start
        # Once a cluster has been passed over the walk goes on at the next, in step with them.
        while point < end and not _hit(differs, cluster, point):
            point += STEP
            if point < end:
                out.append(point)
    return out


def _passed_over(pieces: Ranges, differs: Ranges, cluster: int) -> Ranges:
    """What lies behind the first written piece of each cluster, to the cluster's end."""
    ends = pieces.end[pieces.end % cluster != 0]
    low = np.unique(ends // cluster) * cluster
    if not len(low) or not len(differs):
        return Ranges(low[:0], low[:0])
    index = np.searchsorted(differs.end, low, "right")
    low, index = low[index < len(differs)], index[index < len(differs)]
    first = np.maximum(differs.start[index], low)
    low, first = low[first < low + cluster], first[first < low + cluster]
    stop = pieces.end[np.searchsorted(pieces.end, first, "right")]
    inside = stop < low + cluster
    return Ranges(stop[inside], low[inside] + cluster)


def _read_again(
    whole: Ranges, differs: Ranges, steps: list[int], cluster: int, new_size: int
) -> Ranges:
    """What is read of the old view before the piece is found to outreach the new backing."""
    none = Ranges(np.zeros(0, np.int64), np.zeros(0, np.int64))
    index = int(np.searchsorted(whole.start, new_size, "left")) - 1
    if index < 0 or int(whole.end[index]) <= new_size:
        return none
    start, end = int(whole.start[index]), int(whole.end[index])
    inside = [step for step in steps if start < step <= new_size]
    point = max(inside, default=start)
    if point % cluster and _hit(differs, cluster, point):
        point = -(-point // cluster) * cluster
    if point >= new_size:
        return none
    point += (new_size - point - 1) // STEP * STEP
    end = min(end, point + STEP)
    if end <= new_size:
        return none
    return Ranges(np.array([new_size], np.int64), np.array([end], np.int64))
