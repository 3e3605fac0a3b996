"""Memory to read files into."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["aligned"]

_LINE = 64


def aligned(length: int) -> npt.NDArray[np.uint8]:
    """`length` bytes, content undefined, from the beginning of a cache line on.

    malloc puts what is large 16 bytes behind the beginning of a page. There some processors
    (AMD's Zen 3 and 4) copy with `rep movsb`, as the kernel does from the page cache, at a
    quarter of their speed; measured: page offsets 1 to 31.
    """
    whole = np.empty(length + _LINE, np.uint8)
    skip = -whole.ctypes.data % _LINE
    return whole[skip : skip + length]
