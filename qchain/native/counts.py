"""Refcounts as they are written: values packed into the bytes of a block."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["encode_refcounts"]


def encode_refcounts(values: npt.NDArray[np.unsignedinteger], order: int) -> bytes:
    """The bytes of refcounts that are 1 << `order` bits wide (0 to 6).

    The inverse of `qchain.qcow2.refcounts.decode_refcounts`. Shape (n,); below a byte's
    width n must fill whole bytes.
    """
    if order >= 3:
        return values.astype(f">u{1 << (order - 3)}").tobytes()
    if order == 0:
        return np.packbits(values.astype(np.uint8), bitorder="little").tobytes()
    per_byte = 8 >> order
    shifts = np.arange(0, 8, 1 << order, dtype=np.uint8)
    parts = values.astype(np.uint8).reshape(-1, per_byte) << shifts
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(parts, axis=1)
    return packed.tobytes()
