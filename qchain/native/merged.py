"""The merged map of a group, window by window: what each cluster of the result is made of.

members  (j first)   A A . . 0 . . c        c: compressed, taken over as it is
         (target)    . B . B B . . .        B alone in its cluster: stays where it is
below                . . D . . . D .        shows through, unless a cluster must be whole
result               new new . B 0 . . c
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Cells, Layer
from qchain.chain.resolve import resolve, windows
from qchain.errors import DataError
from qchain.qcow2.entries import Kind

__all__ = ["Group", "Window", "merged_windows"]

I32 = npt.NDArray[np.int32]
_MOST = 1 << 17
"""Clusters of the result in one window, at most."""


@dataclass(frozen=True)
class Group:
    """What is merged: `members` (kept image first) over `below`, into a disk of `size` bytes.

    Attributes:
        into: the member that receives, by place; -1 for a new file.
        cluster, unit: of the result, in bytes; the unit is what it allocates at once.
        zeroes: whether the result can have zero clusters.
    """

    members: Sequence[Layer]
    below: Sequence[Layer]
    size: int
    into: int
    cluster: int
    unit: int
    zeroes: bool

    @property
    def line(self) -> list[Layer]:
        return [*self.members, *self.below]


@dataclass(slots=True)
class Window:
    """Guest bytes from `start` on in whole clusters of the result, cells of `unit` bytes each.

    All arrays have shape (clusters, cells per cluster). `own`: the group decides there, and not
    the new backing; `depth`, `kind`, `host`: as `resolve` gives them, for the whole line where
    `whole` is set, else for the members alone. `zero`: the group says zeroes.
    """

    start: int
    unit: int
    depth: I32
    kind: npt.NDArray[np.uint8]
    host: npt.NDArray[np.uint64]
    own: npt.NDArray[np.bool_]
    zero: npt.NDArray[np.bool_]


def merged_windows(group: Group) -> Iterator[Window]:
    """The windows in which any member decides anything, in guest order.

    Raises: `DataError` where a cluster that decides breaks the format.
    """
    # What is below counts for their length: its cells may be wanted too.
    for low, high in windows(group.line, 0, group.size):
        if _nothing(group, low, high):
            continue
        step = _MOST * group.cluster
        for start in range(low, high, step):
            yield _window(group, start, min(high, start + step))


def _nothing(group: Group, low: int, high: int) -> bool:
    """Whether no member allocates anything there, nor hides what is below by its end."""
    if any(layer.next_used(low) < high for layer in group.members if layer.size > low):
        return False
    hides = min((layer.size for layer in group.members), default=0)
    return not group.below or max(low, hides) >= min(high, group.below[0].size)


def _window(group: Group, low: int, high: int) -> Window:
    depth, cells = resolve(group.members, low, high)
    unit = math.gcd(cells.unit, group.unit)
    window = _shaped(group, low, depth, cells, unit)
    if _parted(group, window):
        # What the new backing shows is copied where a unit of the result is to be whole.
        own = window
        depth, cells = resolve(group.line, low, high)
        unit = math.gcd(math.gcd(cells.unit, group.unit), own.unit)
        window = _shaped(group, low, depth, cells, unit)
        factor = own.unit // unit
        window.own = np.repeat(own.own, factor, axis=1)
        window.zero = np.repeat(own.zero, factor, axis=1)
    invalid = window.kind == Kind.INVALID
    if invalid.any():
        row, column = (int(each[0]) for each in np.nonzero(invalid))
        raise DataError(
            group.line[int(window.depth[row, column])].path,
            f"the L2 entry of guest offset {low + row * group.cluster + column * window.unit} "
            "breaks the format",
            "see 'qemu-img check'",
        )
    return window


def _shaped(group: Group, low: int, depth: I32, cells: Cells, unit: int) -> Window:
    """The cells in whole clusters; beyond the end of the disk they are as the last one is, but
    without data."""
    factor = cells.unit // unit
    cells = cells.refine(unit)
    depth = np.repeat(depth, factor)
    per = group.cluster // unit
    missing = -len(depth) % per
    kind, host = cells.kind, cells.host
    if missing:
        last = int(kind[-1])
        depth = np.pad(depth, (0, missing), "edge")
        host = np.pad(host, (0, missing), "edge")
        # A cluster that grows one day must not show what was never the disk's.
        kind = np.pad(kind, (0, missing), constant_values=Kind.ZERO if last == Kind.DATA else last)
    own = (kind != Kind.UNALLOCATED) & (depth < len(group.members))
    zero = own & ((kind == Kind.ZERO) | (kind == Kind.PAST_END))
    limit = group.below[0].size if group.below else 0
    # Behind the end of the new backing there is nothing to hide; a raw hole is none there.
    free = kind == Kind.PAST_END
    for index, layer in enumerate(group.members):
        if layer.terminal:
            free |= (depth == index) & (kind == Kind.ZERO)
    first = max(0, -(-(limit - low) // unit))
    free[:first] = False
    own &= ~free
    zero &= ~free
    shape = (-1, per)
    return Window(
        low,
        unit,
        depth.reshape(shape),
        kind.reshape(shape),
        host.reshape(shape),
        own.reshape(shape),
        zero.reshape(shape),
    )


def _parted(group: Group, window: Window) -> bool:
    """Whether a unit of the result is decided by the group in part only, with data in it."""
    if not group.below:
        return False
    own = window.own.reshape(-1, group.unit // window.unit)
    return bool((own.any(axis=1) & ~own.all(axis=1)).any())
