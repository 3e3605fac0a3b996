"""Which pieces a commit writes as zeroes, and which as data although they are zero.

qemu's mirror asks the block status at the start of each dirty piece. It writes zeroes only
where one extent without data covers whole pieces and whole clusters of the target
(`mirror_iteration`, `bdrv_round_to_clusters`); else it copies:

piece    |---0---|---1---|---2---|-3-|
status   z z z z z z|d d|z z|y y  z z      z, y: zero, but in two layers; d: data
written  zeroes  copied  copied  copied    (3: the disk ends within it)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer
from qchain.chain.resolve import resolve
from qchain.qcow2.entries import NO_HOST, Kind

__all__ = ["copied_pieces"]

Bools = npt.NDArray[np.bool_]


def copied_pieces(
    chain: Sequence[Layer], start: int, dirty: Bools, piece: int, cluster: int
) -> Bools:
    """Which dirty pieces are copied as data.

    Args:
        chain: the committed point, active first, down to the base.
        start: guest offset of the first piece, aligned as a window.
        dirty: shape (n,), one per piece; the last may be cut by the end of the disk.
        piece: bytes of a piece, the commit's granularity.
        cluster: cluster size of the target (of a raw one: `piece`).

    Returns: shape (n,).
    """
    size = chain[0].size
    end = min(start + len(dirty) * piece, size)
    depth, cells = resolve(chain, start, end)
    zero = (cells.kind != Kind.DATA) & (cells.kind != Kind.COMPRESSED)
    zero &= cells.kind != Kind.INVALID
    follows = np.where(
        cells.host[:-1] == NO_HOST, cells.host[:-1], cells.host[:-1] + np.uint64(cells.unit)
    )
    breaks = (depth[1:] != depth[:-1]) | (cells.kind[1:] != cells.kind[:-1])
    breaks |= cells.host[1:] != follows
    extent = np.concatenate(([0], np.cumsum(breaks)))

    # The cells in which a piece begins and ends; one that the disk cuts has no end.
    offsets = np.arange(len(dirty), dtype=np.int64) * piece
    whole = start + offsets + piece <= size
    first = np.minimum(offsets // cells.unit, len(extent) - 1)
    last = np.minimum((offsets + piece - 1) // cells.unit, len(extent) - 1)
    zeroed: Bools = dirty & whole & zero[first] & (extent[first] == extent[last])
    if cluster > piece and zeroed.any():
        # One request per extent: as a whole it covers whole clusters, or it is copied.
        joins = zeroed[1:] & zeroed[:-1] & (extent[first[1:]] == extent[last[:-1]])
        starts = np.flatnonzero(zeroed & ~np.concatenate(([False], joins)))
        ends = np.flatnonzero(zeroed & ~np.concatenate((joins, [False]))) + 1
        aligned = ((start + starts * piece) % cluster == 0) & (
            (start + ends * piece) % cluster == 0
        )
        steps = np.zeros(len(dirty) + 1, np.int64)
        np.add.at(steps, starts[aligned], 1)
        np.add.at(steps, ends[aligned], -1)
        zeroed = np.cumsum(steps[:-1]) > 0
    return dirty & ~zeroed
