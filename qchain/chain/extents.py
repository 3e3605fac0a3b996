"""The map of a chain as `qemu-img map` gives it: equal neighbours joined, streamed.

`qchain.chain.resolve.runs` joins within a window only and keeps what readers need
(every compressed cluster is a run of its own, with its descriptor). Here the same
tables are brought to what a person sees, and joined across windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from qchain.chain.extent import Extent
from qchain.chain.layer import Layer
from qchain.chain.resolve import Runs, runs
from qchain.qcow2.entries import NO_HOST, Kind

__all__ = ["extents", "joined_runs"]


def joined_runs(layers: Sequence[Layer], start: int = 0, end: int | None = None) -> Iterator[Runs]:
    """The chain's state over guest bytes [start, end), equal neighbours always joined.

    The rule is qemu-img's `entry_mergeable`: all fields equal, and the host offsets, where
    there are any, follow each other. In these tables compressed runs have no host offset,
    and what lies past the end of a short layer is `Kind.UNALLOCATED` at the depth that
    qemu-img names (that of the layer above). Memory: one window, whatever the disk's size.

    Raises: `ImageError` when an image cannot be read.
    """
    held: Runs | None = None
    for table in runs(layers, start, end):
        found = _join(_as_shown(table) if held is None else _append(held, _as_shown(table)))
        # The last run may go on in the next window.
        if len(found) > 1:
            yield _slice(found, 0, len(found) - 1)
        held = _slice(found, len(found) - 1, len(found))
    if held is not None and len(held):
        yield held


def extents(layers: Sequence[Layer], start: int = 0, end: int | None = None) -> Iterator[Extent]:
    """The extents of guest bytes [start, end), in order and without gaps (see `joined_runs`)."""
    for table in joined_runs(layers, start, end):
        yield from table.extents()


def _as_shown(table: Runs) -> Runs:
    past = table.kind == Kind.PAST_END
    depth, kind = table.depth, table.kind
    if past.any():
        depth = depth - past
        kind = np.where(past, np.uint8(Kind.UNALLOCATED), kind)
    host = np.where(kind == Kind.COMPRESSED, np.uint64(NO_HOST), table.host)
    return Runs(table.start, table.length, depth, kind, host)


def _join(table: Runs) -> Runs:
    if len(table) < 2:
        return table
    host = table.host
    follows = np.where(host == NO_HOST, host, host + table.length.astype(np.uint64))
    change = (
        (table.depth[1:] != table.depth[:-1])
        | (table.kind[1:] != table.kind[:-1])
        | (host[1:] != follows[:-1])
    )
    first: npt.NDArray[np.intp] = np.concatenate(([0], np.flatnonzero(change) + 1))
    if len(first) == len(table):
        return table
    starts = table.start[first]
    end = int(table.start[-1] + table.length[-1])
    return Runs(
        starts, np.diff(np.append(starts, end)), table.depth[first], table.kind[first], host[first]
    )


def _append(a: Runs, b: Runs) -> Runs:
    return Runs(*(np.concatenate((getattr(a, n), getattr(b, n))) for n in Runs.__slots__))


def _slice(table: Runs, low: int, high: int) -> Runs:
    return Runs(*(getattr(table, name)[low:high] for name in Runs.__slots__))
