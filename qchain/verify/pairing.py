"""Two points side by side: where they resolve to the same place, and where they might differ.

A   |--A0---|--hole--|----A1-----|
B   |--A0---|-----B0------|--A1--|        (A0: the same file and offset)
pair  same    differ? differ?  same
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer
from qchain.chain.resolve import Runs, runs, windows
from qchain.hostfile import FileId
from qchain.qcow2.entries import NO_HOST, Kind

__all__ = ["Pairs", "pair_up", "pairs_in", "united"]

_CELLS = 1 << 15
"""Of a window: small, so that reading can begin while the next one is paired."""


@dataclass(slots=True)
class Pairs:
    """Aligned segments of two points: run i of `a` and run i of `b` cover the same guest bytes.

    `same`: shape (n,), both resolve to the same (device, inode, offset). `zero`: both
    read as zeroes without looking.
    """

    a: Runs
    b: Runs
    same: npt.NDArray[np.bool_]
    zero: npt.NDArray[np.bool_]


def _place(layer: Layer) -> tuple[FileId, FileId | None]:
    encrypted = layer.header is not None and layer.header.crypt_method != 0
    return layer.data.id, layer.file.id if encrypted else None


def _files(a: Sequence[Layer], b: Sequence[Layer]) -> tuple[npt.NDArray[np.int64], ...]:
    # Decrypted data is not what lies at that place: whose key it was is part of the place.
    numbers: dict[tuple[FileId, FileId | None], int] = {}
    return tuple(
        np.array([numbers.setdefault(_place(layer), len(numbers)) for layer in side], np.int64)
        for side in (a, b)
    )


def _reads_zero(kind: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    out: npt.NDArray[np.bool_] = (kind != Kind.DATA) & (kind != Kind.COMPRESSED)
    return out


def _split(table: Runs, starts: npt.NDArray[np.int64], end: int) -> Runs:
    index = np.searchsorted(table.start, starts, "right") - 1
    moves = (table.host[index] != NO_HOST) & (table.kind[index] != Kind.COMPRESSED)
    shift = np.where(moves, starts - table.start[index], 0).astype(np.uint64)
    lengths = np.diff(np.append(starts, end))
    return Runs(starts, lengths, table.depth[index], table.kind[index], table.host[index] + shift)


def united(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """As `np.union1d`, which would load all of numpy.ma: a tenth of a small command's time."""
    both = np.concatenate([a, b])
    both.sort()
    first: npt.NDArray[np.bool_] = np.append(True, both[1:] != both[:-1])
    return both[first]


def _nothing(start: int, end: int) -> Runs:
    """One run of what is past the end."""
    return Runs(
        np.array([start], np.int64),
        np.array([end - start], np.int64),
        np.zeros(1, np.int32),
        np.array([Kind.PAST_END], np.uint8),
        np.array([NO_HOST], np.uint64),
    )


def _side(layers: Sequence[Layer], start: int, end: int) -> Runs:
    """The runs of [start, end), zero beyond the end of the disk."""
    tables = list(runs(layers, start, min(end, layers[0].size))) if start < layers[0].size else []
    if layers[0].size < end:
        begin = max(start, layers[0].size)
        tables.append(_nothing(begin, end))
    if len(tables) == 1:
        return tables[0]
    return Runs(
        *(np.concatenate([getattr(table, name) for table in tables]) for name in Runs.__slots__)
    )


def pair_up(a: Sequence[Layer], b: Sequence[Layer]) -> Iterator[Pairs]:
    """Both points (layers, active first) over the longer one's size, in windows."""
    longer = a if a[0].size >= b[0].size else b
    finest = min((*a, *b), key=lambda layer: layer.granularity)
    # Windows of the finer side bound the memory of both.
    for start, end in windows([longer[0], finest, *a, *b], 0, longer[0].size, _CELLS):
        yield pairs_in(a, b, start, end)


def pairs_in(
    a: Sequence[Layer],
    b: Sequence[Layer],
    start: int,
    end: int,
    cuts: npt.NDArray[np.int64] | None = None,
) -> Pairs:
    """The pairs of [start, end), cut at `cuts` too. `b` without a layer: nothing but zeroes."""
    file_a, file_b = _files(a, b)
    left = _side(a, start, end)
    right = _side(b, start, end) if b else _nothing(start, end)
    starts = united(left.start, right.start)
    if cuts is not None:
        starts = united(starts, cuts[(cuts > start) & (cuts < end)])
    left, right = _split(left, starts, end), _split(right, starts, end)
    zero = _reads_zero(left.kind) & _reads_zero(right.kind)
    same = (left.host == right.host) & (left.kind == right.kind)
    same &= (left.host != NO_HOST) & ~_reads_zero(left.kind)
    if b:
        same &= file_a[left.depth] == file_b[right.depth]
    return Pairs(left, right, same, zero)
