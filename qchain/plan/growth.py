"""How much a target grows: new clusters, less those that were free, plus what accounts for them.

file  |used|free|used|used| end
new   data and L2 tables take the free ones first, then go to the end, where
      new refcount blocks may be needed, which need refcounts themselves
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qchain.chain.layer import Layer
from qchain.qcow2.refcounts import read_refcount_table, refcount_blocks

__all__ = ["Room", "growth", "room_of"]


@dataclass(frozen=True, slots=True)
class Room:
    """What a qcow2 file has of its own, in clusters.

    Attributes:
        end: the first cluster after the last used one.
        free: unused clusters before the end.
        covered: clusters that the present refcount blocks account for.
        table: refcount blocks that the present refcount table has room for.
    """

    end: int
    free: int
    covered: int
    table: int


def room_of(layer: Layer) -> Room:
    """Read it from the refcounts. Raises `ImageError` when they cannot be read."""
    header = layer.header
    assert header is not None
    end = used = 0
    for first, counts in refcount_blocks(layer.file, header):
        taken = counts != 0
        count = int(np.count_nonzero(taken))
        if count:
            end = first + len(taken) - int(np.argmax(taken[::-1]))
            used += count
    per_block = header.cluster_size * 8 // header.refcount_bits
    covered = len(read_refcount_table(layer.file, header)) * per_block
    table = header.refcount_table_clusters * header.cluster_size // 8
    return Room(end, end - used, covered, table)


def growth(layer: Layer, clusters: int, new_size: int) -> int:
    """Bytes by which the file of `layer` grows when it gets `clusters` new clusters.

    Args:
        clusters: new data clusters and L2 tables.
        new_size: virtual size afterwards; a larger one may need a new L1 table.

    Raw files: `clusters` are blocks of 4096 bytes that were holes.
    """
    header = layer.header
    if header is None:
        return clusters * 4096
    cluster = header.cluster_size
    span = cluster * header.l2_entries
    needed = -(-new_size // span)
    if needed > header.l1_size:
        clusters += -(-needed * 8 // cluster)
    if not clusters:
        return 0
    room = room_of(layer)
    beyond = max(0, clusters - room.free)
    per_block = cluster * 8 // header.refcount_bits
    # Each new block accounts for itself too.
    blocks = max(0, -(-(room.end + beyond - room.covered) // (per_block - 1)))
    if room.covered // per_block + blocks > room.table:
        # A larger table is written anew: half as large again, as qemu does.
        blocks += -(-(room.table * 3 // 2 + blocks) * 8 // cluster)
    return (beyond + blocks) * cluster
