"""Masks of a window's cells: what is set, rounded out, joined, shown from above."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "NOTHING",
    "Bools",
    "Shown",
    "any_of",
    "cut",
    "in_parts",
    "round_out",
    "runs_in",
    "union",
]

Bools = npt.NDArray[np.bool_]


def runs_in(mask: Bools) -> int:
    """How many contiguous runs of True."""
    if not len(mask):
        return 0
    return int(mask[0]) + int(np.count_nonzero(mask[1:] > mask[:-1]))


def round_out(mask: Bools, unit: int, to: int) -> Bools:
    """`mask` (cells of `unit`) grown to whole pieces of `to` bytes, still in cells of `unit`."""
    if to <= unit:
        return mask
    return np.repeat(any_of(mask, unit, to), max(1, to // unit))[: len(mask)]


def any_of(mask: Bools, unit: int, to: int) -> Bools:
    """Per piece of `to` bytes: is any cell set? (`to` ≤ `unit`: the cells themselves.)"""
    factor = to // unit
    if factor <= 1:
        return mask
    short = -len(mask) % factor
    if short:
        mask = np.concatenate((mask, np.zeros(short, bool)))
    out: Bools = np.any(mask.reshape(-1, factor), axis=1)
    return out


def in_parts(mask: Bools, parts: int) -> Bools:
    """Each cell in so many parts."""
    return mask if parts == 1 else np.repeat(mask, parts)


def cut(mask: Bools | None, count: int) -> Bools | None:
    return None if mask is None else mask[:count]


def union(a: Bools | None, b: Bools | None) -> Bools | None:
    if a is None or a is b:
        return b
    return a if b is None else a | b


class Shown:
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

    def over(self, lower: Shown) -> Shown:
        """These layers and, below them, those of `lower`."""
        if self.mask is None:
            return lower
        if lower.mask is None:
            return self
        zero = self.zero
        if lower.zero is not None:
            zero = union(zero, lower.zero > self.mask)
        return Shown(self.mask | lower.mask, zero)


NOTHING = Shown(None, None)
