"""Which L2 tables of a target come to be used."""

from __future__ import annotations

import numpy as np

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.plan.cells import Bools
from qchain.qcow2.header_limits import MAX_L1_BYTES

__all__ = ["NewTables"]


class NewTables:
    """Which L2 tables of a target come to be used.

    Held for the whole target, as its L1 is: one table may span many windows.
    """

    def __init__(self, layer: Layer, size: int) -> None:
        self.span = 0
        if isinstance(layer, Qcow2Layer):
            self.span = layer.cluster_size * layer.tables.per_table
            # No table is larger, whatever the kept image announces.
            count = min(-(-size // self.span), MAX_L1_BYTES // 8)
            self.touched = np.zeros(count, bool)
            there = layer.tables.l1[: len(self.touched)] != 0
            self.there = np.zeros(len(self.touched), bool)
            self.there[: len(there)] = there

    def touch(self, written: Bools, unit: int, start: int) -> None:
        """Note what is written into a window: cells of `unit` bytes from guest byte `start`."""
        if not self.span:
            return
        low, high = start // self.span, (start + len(written) * unit - 1) // self.span + 1
        if high <= len(self.there) and self.there[low:high].all():
            return  # the usual case, and the rest is slow
        cells = np.flatnonzero(written)
        if not len(cells):
            return
        first = (start + cells * unit) // self.span
        first = first[first < len(self.touched)]
        self.touched[first] = True
        tables = unit // self.span
        if tables > 1:
            # The cells of a window where little is allocated may cover several tables, and
            # then they are few.
            for index in first.tolist():
                self.touched[index : index + tables] = True

    @property
    def new(self) -> int:
        return int(np.count_nonzero(self.touched & ~self.there)) if self.span else 0
