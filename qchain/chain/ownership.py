"""How much each layer allocates, and how much of that the guest sees.

Only the question "allocated?" is asked, in the finest unit of a window, with
no decoding of entries: this runs at the speed of reading the L2 tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer, Masks
from qchain.chain.parallel import in_order, workers
from qchain.chain.resolve import mask_windows, windows

__all__ = ["Ownership", "layer_masks", "ownership", "unify", "workers"]


Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Ownership:
    """Bytes of one layer: owned + shadowed = allocated."""

    allocated: int
    owned: int

    @property
    def shadowed(self) -> int:
        return self.allocated - self.owned


def unify(
    layers: Sequence[Layer], found: Sequence[Masks | None], start: int, end: int
) -> tuple[int, list[Masks | None]]:
    """The masks of a window in one common unit, all of the window's length.

    Args:
        found: what each layer answered for [start, min(end, its size)).

    Returns: bytes per cell, which divides the window and every layer's end in it; and
        the masks, each of shape ((end - start) / unit,), False beyond a layer's end.
    """
    unit = end - start
    for layer, masks in zip(layers, found, strict=True):
        if start < layer.size < end:
            unit = math.gcd(unit, layer.size - start)
        if masks is not None:
            unit = math.gcd(unit, masks.unit)
    unit &= -unit  # a power of two, so that cells divide clusters and granularities
    count = (end - start) // unit

    def widen(mask: Bools, cell: int, limit: int) -> Bools:
        wide = np.repeat(mask, cell // unit) if cell != unit else mask
        if len(wide) == count and limit >= count:
            return wide
        full = np.zeros(count, bool)
        used = min(limit, len(wide))
        full[:used] = wide[:used]
        return full

    out: list[Masks | None] = []
    for layer, masks in zip(layers, found, strict=True):
        if masks is None:
            out.append(None)
            continue
        limit = min(count, (layer.size - start) // unit)
        zero = None if masks.zero is None else widen(masks.zero, masks.unit, limit)
        out.append(Masks(unit, widen(masks.allocated, masks.unit, limit), zero))
    return unit, out


def layer_masks(layers: Sequence[Layer], start: int, end: int) -> tuple[int, list[Masks | None]]:
    """The allocation of every layer in a window, in one unit (see `unify`)."""
    found = [
        layer.masks(start, min(layer.size, end)) if layer.size > start else None for layer in layers
    ]
    return unify(layers, found, start, end)


def _window(layers: Sequence[Layer], start: int, end: int) -> dict[int, tuple[int, int]]:
    """(allocated, owned) bytes of the layers that allocate in this window."""
    unit, masks = layer_masks(layers, start, end)
    count = (end - start) // unit
    out: dict[int, tuple[int, int]] = {}
    covered: Bools | None = None
    hidden_from = count
    above = 0
    for index, answer in enumerate(masks):
        if answer is None:
            continue
        mask = answer.allocated
        # Whatever lies past the end of a layer above is hidden from here on.
        for layer in layers[above:index]:
            hidden_from = min(hidden_from, max(0, layer.size - start) // unit)
        above = index
        total = int(np.count_nonzero(mask))
        if covered is None:
            owned = total if hidden_from >= count else int(np.count_nonzero(mask[:hidden_from]))
            covered = mask
        else:
            visible = mask[:hidden_from] > covered[:hidden_from]
            owned = int(np.count_nonzero(visible))
            covered = covered | mask
        out[index] = (total * unit, owned * unit)
    return out


def ownership(
    layers: Sequence[Layer], progress: Callable[[int, int], None] | None = None
) -> list[Ownership]:
    """Allocated and owned bytes of every layer (active first), over its own size.

    Bytes of a layer beyond the active one's end are allocated and never owned.
    `progress` is called with (bytes done, bytes in all).
    """
    sums = np.zeros((len(layers), 2), np.int64)
    size = layers[0].size
    spans = list(mask_windows(layers))
    answers = in_order(lambda span: _window(layers, *span), spans)
    for (_, end), counts in zip(spans, answers, strict=True):
        for index, pair in counts.items():
            sums[index] += pair
        if progress is not None:
            progress(end, size)
    for index, layer in enumerate(layers):
        if layer.size > size:
            sums[index, 0] += _beyond(layer, size)
    return [Ownership(int(allocated), int(owned)) for allocated, owned in sums]


def _beyond(layer: Layer, start: int) -> int:
    """Bytes that `layer` allocates from `start` (the end of the disk above it) on."""
    total = 0
    aligned = start // layer.granularity * layer.granularity
    for low, high in windows([layer], aligned // (2 << 20) * (2 << 20)):
        unit, masks = layer_masks([layer], low, high)
        for answer in masks:
            if answer is None:
                continue
            mask = answer.allocated
            skip = max(0, start - low)
            total += int(np.count_nonzero(mask[skip // unit :])) * unit
            if skip % unit and skip // unit < len(mask) and mask[skip // unit]:
                total -= skip % unit
    return total
