"""What a copy of a group costs: a new file over the new backing, then in the kept name's place.

convert copies the data that the kept image holds itself (with no new backing all that shows);
what lies between is then pulled in as into the kept image. Zeroes found in data are left out,
so these are upper bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qchain.chain.layer import Layer
from qchain.chain.ownership import layer_masks
from qchain.chain.parallel import in_order
from qchain.chain.resolve import mask_windows

__all__ = ["copied_bytes", "new_file_bytes"]


def copied_bytes(layers: Sequence[Layer], alone: bool) -> int:
    """Bytes of data of the kept image, `layers[0]`; `alone`: of all that shows through it.

    Args:
        layers: the whole chain of the kept image, itself first.
    """
    shown = layers if alone else layers[:1]
    size = layers[0].size

    def window(span: tuple[int, int]) -> int:
        start, end = span[0], min(span[1], size)
        if end <= start:
            return 0
        unit, masks = layer_masks(shown, *span, zeroes=True)
        left = np.ones((span[1] - span[0]) // unit, bool)
        total = 0
        for layer, answer in zip(shown, masks, strict=True):
            if answer is not None:
                data = answer.allocated & left
                left &= ~answer.allocated
                if answer.zero is not None:
                    data &= ~answer.zero
                total += int(np.count_nonzero(data))
            if layer.size < end:
                left[max(0, layer.size - start) // unit :] = False
        return total * unit

    return sum(in_order(window, list(mask_windows(shown))))


def new_file_bytes(kept: Layer, written: int, extents: int) -> int:
    """The most that a new file like `kept` takes for `written` bytes in `extents` runs."""
    header = kept.header
    if header is None:
        return written
    cluster = header.cluster_size
    whole = -(-kept.size // cluster)
    clusters = min(whole, -(-written // cluster) + 2 * extents)
    span = cluster * header.l2_entries
    tables = min(-(-kept.size // span), clusters)
    l1 = -(-(-(-kept.size // span) * 8) // cluster)
    counted = clusters + tables + l1 + 3
    per_block = cluster * 8 // header.refcount_bits
    blocks = -(-counted // max(1, per_block - 1)) + 1
    return (counted + blocks + -(-blocks * 8 // cluster)) * cluster
