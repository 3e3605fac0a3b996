"""What `qemu-img resize --shrink` frees in a target that is longer than the kept image.

guest  |... kept ...|... beyond ...|
freed  clusters and L2 tables of what is beyond, then refcount blocks that count nothing any
       more; the file is cut behind its last used cluster

Source: qemu's `qcow2_co_truncate`, `qcow2_shrink_l1_table`, `qcow2_shrink_reftable`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Qcow2Layer
from qchain.plan.clusters import ClusterCount, count_equal
from qchain.qcow2.refcounts import read_refcount_table, refcount_blocks

__all__ = ["Shrunk", "shrunk"]

I64 = npt.NDArray[np.int64]

_CLUSTERS = 1 << 17
"""How many entries are looked at in one piece."""


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The file as it would be if nothing were added to it, in clusters.

    Attributes:
        freed: what loses its last reference, by the commit as well.
        emptied: refcount blocks that go; `freed` holds them too.
        last_emptied: whether the block of the last used cluster is one of these.
        end: the first after the last used one.
        blocks: refcount blocks up to the last one that stays.
    """

    freed: int
    emptied: int
    last_emptied: bool
    end: int
    blocks: int


def shrunk(layer: Qcow2Layer, count: ClusterCount, before: I64) -> Shrunk:
    """What is left of the file once `count` is done and `layer` is cut to the new size.

    `before`: the numbers of clusters that are not used any more when it begins.

    Raises: `ImageError` when the refcounts or the tables cannot be read.
    """
    header = layer.header
    assert header is not None
    bits = layer.cluster_bits
    gone = [before, *count.let_go, *_beyond(layer, count)]
    per_block = header.cluster_size * 8 // header.refcount_bits
    table = read_refcount_table(layer.file, header).astype(np.int64) >> bits
    hosts, drops = count_equal(gone)
    empty = [
        start // per_block
        for start, left in _left(layer, hosts, drops)
        # A block that counts only itself counts nothing.
        if not np.any(np.flatnonzero(left) + start != table[start // per_block])
    ]
    if empty:
        hosts, drops = count_equal([*gone, table[empty]])
    all_used = used = end = last = 0
    for start, refcounts in refcount_blocks(layer.file, header):
        taken = int(np.count_nonzero(refcounts))
        all_used += taken
        last = start // per_block if taken else last
    for start, left in _left(layer, hosts, drops):
        places = np.flatnonzero(left)
        used += len(places)
        end = start + int(places[-1]) + 1 if len(places) else end
    present = np.flatnonzero(table)
    staying = np.setdiff1d(present, empty)
    blocks = int(staying[-1]) + 1 if len(staying) else 0
    return Shrunk(all_used - len(before) - used, len(empty), last in empty, end, blocks)


def _left(layer: Qcow2Layer, hosts: I64, drops: I64) -> Iterator[tuple[int, I64]]:
    """The refcounts, block by block, without the references that go."""
    header = layer.header
    assert header is not None
    for start, refcounts in refcount_blocks(layer.file, header):
        left = refcounts.astype(np.int64)
        low, high = np.searchsorted(hosts, (start, start + len(left))).tolist()
        left[hosts[low:high] - start] -= drops[low:high]
        yield start, left


def _beyond(layer: Qcow2Layer, count: ClusterCount) -> Iterator[I64]:
    """Host clusters of everything past the new size: data, compressed bytes, L2 tables."""
    bits, tables = layer.cluster_bits, layer.tables
    first = -(-count.new_size >> bits)
    while (first := tables.next_table(first)) < tables.clusters:
        last = min(first + _CLUSTERS, tables.clusters)
        own = count.own(first << bits, last << bits, count.unit)
        if own is not None:
            everything = np.ones(last - first, bool)
            yield own.hosts(everything)
            packed = own.packed_hosts(everything)
            if packed is not None:
                yield packed
        first = last
    beyond = tables.l1[-(-count.new_size // (layer.cluster_size * tables.per_table)) :]
    yield beyond[beyond != 0].astype(np.int64) >> bits
