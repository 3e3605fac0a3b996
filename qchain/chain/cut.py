"""Data that lies beyond the end of its file: a copy that was cut short reads as zeroes there.

qemu reads so without a word (measured with 7.2), and so do we; whoever shows what was read
should say it. Told without a pass over the clusters that is not made anyway:

- by runs (`beyond_end`), where the map is looked at;
- by `Layer.cut`, where data was read;
- by refcounts (`counted_beyond`), where neither is: an image counts as used what its file
  does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qchain.chain.layer import Layer
from qchain.chain.resolve import Runs
from qchain.errors import ImageError
from qchain.qcow2.entries import Kind
from qchain.qcow2.header import Header
from qchain.qcow2.refcounts import decode_refcounts, read_refcount_table

__all__ = ["beyond_end", "counted_beyond"]

_ENDLESS = (1 << 64) - 1


def beyond_end(layers: Sequence[Layer], table: Runs) -> list[int]:
    """The layers that own data of `table` which reaches beyond the end of their file."""
    sizes = [_ENDLESS if layer.terminal else layer.data.size for layer in layers]
    ends = np.array(sizes, np.uint64)
    past = table.host + table.length.view(np.uint64) > (
        ends if len(ends) == 1 else ends[table.depth]
    )
    past &= table.kind == Kind.DATA
    return np.unique(table.depth[past]).tolist() if past.any() else []


def counted_beyond(layer: Layer) -> bool:
    """Whether refcounts count clusters that begin beyond the end of the file.

    One refcount block is read, whatever the size of the file. Damaged refcounts are no matter
    of this (see `qchain.qcow2.check`).
    """
    if layer.header is None or layer.data is not layer.file:
        return False
    try:
        return _counted_beyond(layer, layer.header)
    except ImageError:
        return False


def _counted_beyond(layer: Layer, header: Header) -> bool:
    table = read_refcount_table(layer.file, header)
    per_block = header.cluster_size * 8 >> header.refcount_order
    first = -(-layer.file.size // header.cluster_size)
    index = first // per_block
    # The blocks of what follows lie there themselves, in an image that qemu wrote.
    if (table[index + 1 :] >= np.uint64(layer.file.size)).any():
        return True
    if index >= len(table) or not table[index]:
        return False
    raw = layer.file.pread(int(table[index]), header.cluster_size)
    counts = decode_refcounts(raw[: len(raw) // 8 * 8], header.refcount_order)
    return bool(counts[first % per_block :].any())
