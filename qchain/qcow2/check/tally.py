"""References counted, for a window of host clusters; and what each cluster is used as."""

from __future__ import annotations

from enum import IntFlag

import numpy as np
import numpy.typing as npt

from qchain.qcow2.check.overlay import I64

__all__ = ["WINDOW", "Tally", "Use"]

WINDOW = 1 << 23
"""Host clusters counted at a time: it bounds the memory, whatever the size of the file."""


class Use(IntFlag):
    """What a host cluster is used as."""

    HEADER = 1
    L1 = 2
    L2 = 4
    DATA = 8
    COMPRESSED = 16
    SNAPSHOT_TABLE = 32
    REFCOUNT_TABLE = 64
    REFCOUNT_BLOCK = 128
    BITMAP_DIRECTORY = 256
    BITMAP_TABLE = 512
    BITMAP_DATA = 1024
    LUKS = 2048

    @property
    def words(self) -> str:
        """For people: 'L2 table and data'."""
        names = [_WORDS[use] for use in Use if use in self]
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


_WORDS = {
    Use.HEADER: "header",
    Use.L1: "L1 table",
    Use.L2: "L2 table",
    Use.DATA: "data",
    Use.COMPRESSED: "compressed data",
    Use.SNAPSHOT_TABLE: "snapshot table",
    Use.REFCOUNT_TABLE: "refcount table",
    Use.REFCOUNT_BLOCK: "refcount block",
    Use.BITMAP_DIRECTORY: "bitmap directory",
    Use.BITMAP_TABLE: "bitmap table",
    Use.BITMAP_DATA: "bitmap",
    Use.LUKS: "LUKS header",
}


class Tally:
    """Reference counts of host clusters low..high-1.

    `counts`: shape (high - low,); 64 bits, because one entry may be reached by 2^38 ways.
    `uses`: shape (high - low,), bits of `Use`.
    """

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.counts = np.zeros(high - low, np.uint64)
        self.uses = np.zeros(high - low, np.uint16)

    def add_range(self, first: int, last: int, weight: int, use: Use) -> None:
        """Each of the clusters first..last has `weight` more references."""
        begin, end = max(first, self.low) - self.low, min(last + 1, self.high) - self.low
        if begin < end:
            self.counts[begin:end] += np.uint64(weight)
            self.uses[begin:end] |= np.uint16(use)

    def add_spans(self, first: I64, last: I64, weight: int | I64, use: Use) -> None:
        """As `add_range` for many short spans of clusters: arrays of shape (n,)."""
        while len(first):
            inside = (first >= self.low) & (first < self.high)
            weights = weight[inside] if isinstance(weight, np.ndarray) else weight
            self._add(first[inside] - self.low, weights, use)
            more = first < last
            if not more.any():
                return
            first, last = first[more] + 1, last[more]
            weight = weight[more] if isinstance(weight, np.ndarray) else weight

    def _add(self, index: I64, weight: int | I64, use: Use) -> None:
        if not len(index):
            return
        low = int(index.min())
        span = int(index.max()) - low + 1
        if isinstance(weight, np.ndarray):
            np.add.at(self.counts, index, weight.astype(np.uint64))
        elif span <= 4 * len(index):
            # Data mostly lies in the order of the guest: much faster than add.at.
            found = np.bincount(index - low, minlength=span).astype(np.uint64)
            self.counts[low : low + span] += found * np.uint64(weight)
            self.uses[low : low + span][found != 0] |= np.uint16(use)
            return
        else:
            np.add.at(self.counts, index, np.uint64(weight))
        self.uses[index] |= np.uint16(use)

    def overlaps(self) -> npt.NDArray[np.bool_]:
        """Which clusters have more than one use: shape (high - low,)."""
        # Without its lowest bit, a number that has only one is 0.
        out: npt.NDArray[np.bool_] = (self.uses & (self.uses - np.uint16(1))) != 0
        out[self.uses == 0] = False
        return out
