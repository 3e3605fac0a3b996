"""Compressed clusters taken over as they are: whole stretches of a file, not cluster by cluster.

source   ...|aaaa|bb|cccccc|.....|dddd|...      offsets of any byte
new file    |aaaa|bb|cccccc|dddd|               each stretch at the same offset within a block

What lies within a block stays where it is in it, so that stretches can be shared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer
from qchain.native.clusters import Clusters
from qchain.qcow2.entries import COMPRESSED

__all__ = ["take_over"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

_SECTOR = 512
_BLOCK = 4096


def take_over(clusters: Clusters, layers: Sequence[Layer], depth: I64, entries: U64) -> U64:
    """Bring compressed clusters; shape (n,) each.

    Args:
        depth: the layer of each, all of the cluster size of the result.
        entries: their descriptors (`qchain.qcow2.entries.compressed_location`).

    Returns: the new L2 entries, in the order of the old ones.
    """
    shift = np.uint64(62 - (clusters.cluster_bits - 8))
    low = np.uint64((1 << int(shift)) - 1)
    offset = (entries & low).astype(np.int64)
    sectors = ((entries & np.uint64(COMPRESSED - 1)) >> shift).astype(np.int64) + 1
    begin = offset // _SECTOR * _SECTOR
    end = begin + sectors * _SECTOR
    order = np.lexsort((begin, depth))
    depth, begin, end = depth[order], begin[order], end[order]
    # A stretch ends where the next cluster lies a cluster further off, or more: so no host
    # cluster is taken that nothing touches.
    reach = np.concatenate([np.maximum.accumulate(end[depth == each]) for each in np.unique(depth)])
    breaks = (depth[1:] != depth[:-1]) | (begin[1:] >= reach[:-1] + clusters.cluster)
    first = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    last = np.append(first[1:], len(begin)) - 1
    block = min(_BLOCK, clusters.cluster)
    start = begin[first] // block * block
    length = reach[last] - start
    room = -(-length // block) * block
    at = np.cumsum(room) - room
    base = clusters.take(-(-int(room.sum()) // clusters.cluster)) << clusters.cluster_bits
    for index in range(len(first)):
        source = layers[int(depth[first[index]])].data
        clusters.target.bring(source, int(start[index]), base + int(at[index]), int(length[index]))
    stretch = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(begin))))
    move = base + at[stretch] - start[stretch]
    _count(clusters, begin + move, end + move)
    new = np.empty(len(entries), np.uint64)
    moved = (offset[order] + move).astype(np.uint64)
    new[order] = (entries[order] & ~low) | moved | np.uint64(COMPRESSED)
    return new


def _count(clusters: Clusters, begin: I64, end: I64) -> None:
    """Each host cluster is referred to by every compressed cluster that touches it."""
    low, high = begin >> clusters.cluster_bits, (end - 1) >> clusters.cluster_bits
    counts = high - low + 1
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    touched = np.sort(np.repeat(low, counts) + within)
    # Taken clusters count once by themselves.
    again = np.concatenate(([False], touched[1:] == touched[:-1]))
    clusters.refer(touched[again])
