"""The drawing of a chain: who owns which region of the disk."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

from .output import columns
from .tables import count_text, size_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["draw", "regions"]

_REGIONS, _FEWEST = 60, 20
_BESIDE = 13
"""Columns of a row besides the drawing."""
_ROWS = 40
_BLOCKS, _ASCII = "·░▒▓█", ".-+*#"


def regions() -> int:
    """Columns of the drawing, each an equal part of the disk: as the terminal has room."""
    return max(_FEWEST, min(_REGIONS, columns() - _BESIDE))


def draw(shares: npt.NDArray[np.float64], size: int) -> str:
    """One row per layer, active first, shaded by the share of each region that it owns.

    Args:
        shares: shape (layers, regions), bytes owned (`qchain.chain.counts.owned_by_region`).
        size: of the disk, in bytes.
    """
    count = shares.shape[1]
    shades = _shades()
    per_region = max(size / count, 1.0)
    drawn = 0
    rows: list[str] = []
    for index, owned in enumerate(shares):
        # Of very deep chains, only those are drawn that own anything.
        total = float(owned.sum())
        if drawn >= _ROWS or (len(shares) > _ROWS and not total):
            continue
        drawn += 1
        cells = "".join(shades[_level(float(part) / per_region)] for part in owned)
        rows.append(f"{index:>4} {cells} {100 * total / max(size, 1):5.1f} %\n")
    end = size_text(size)
    out = f"     0{end:>{count - 1}}  owned\n" + "".join(rows)
    if drawn < len(shares):
        out += f"     ({count_text(len(shares) - drawn, 'layer')} not drawn)\n"
    marks = zip(shades, ("none", "to 25 %", "to 50 %", "to 75 %", "more"), strict=True)
    legend = "  ".join(f"{shade} {meaning}" for shade, meaning in marks)
    each = f"each column is {size_text(round(per_region))}"
    if _BESIDE + len(each) + len(legend) <= columns():
        return out + f"     {each}; {legend}\n"
    lines = [each, *textwrap.wrap(legend, columns() - 5)]
    return out + "".join(f"     {line}\n" for line in lines)


def _level(share: float) -> int:
    return 0 if share <= 0 else min(4, 1 + int(share * 4 - 1e-9))


def _shades() -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        _BLOCKS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return _ASCII
    return _BLOCKS
