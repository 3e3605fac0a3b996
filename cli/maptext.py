"""The text of a map with millions of extents: whole columns at once, no Python per extent.

Every extent becomes a row of the same number of bytes, in which all that its text does not
need is NUL; the rows without their NULs are the text:

    ,\\n{ "start": 0  0|131 072|, "length": 0 ...|, "depth": 0, "present": true ...

Numbers are written four digits (one 32-bit word) at a time, from a table of all of them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from qchain.qcow2.entries import NO_HOST, Kind

if TYPE_CHECKING:
    import numpy.typing as npt

    from qchain.chain.resolve import Runs

    Words = npt.NDArray[np.uint32]
    Numbers = npt.NDArray[np.uint64]

__all__ = ["ROWS", "json_lines"]

ROWS = 1 << 12
"""Extents at a time: their rows stay in the processor's cache."""
_BASE = 10000
_SHORT = _BASE
_LAST = 2 * _BASE
"""Where in `_digits` the forms without leading zeroes begin; the first zero there is nothing
at all, the second '0'."""
_KINDS = 8


@functools.cache
def _digits() -> Words:
    """Shape (30000,): 0 to 9999 as four ASCII digits; then without leading zeroes (NUL
    instead), zero as nothing; then the same with zero as '0'."""
    full = [b"%04d" % number for number in range(_BASE)]
    short = [b"%d" % number for number in range(_BASE)]
    short = [text.rjust(4, b"\0") for text in short]
    words = b"".join([*full, bytes(4), *short[1:], *short])
    return np.frombuffer(words, np.uint32)


def json_lines(table: Runs, missing: int | None = None) -> bytes:
    """The runs as `qemu-img map --output=json` writes them, each after a comma and a newline.

    Args:
        missing: depth of the layer whose backing file is missing: what it does not allocate
            gets a field `missing`.
    """
    pieces = []
    for low in range(0, len(table), ROWS):
        part = slice(low, low + ROWS)
        depth = table.depth[part].astype(np.int64)
        pieces.append(
            _json_rows(
                table.start[part].astype(np.uint64),
                table.length[part].astype(np.uint64),
                depth * _KINDS + table.kind[part],
                table.host[part],
                None if missing is None else missing * _KINDS + Kind.UNALLOCATED,
            )
        )
    return b"".join(pieces)


def _json_rows(
    start: Numbers,
    length: Numbers,
    classes: npt.NDArray[np.int64],
    host: Numbers,
    missing: int | None,
) -> memoryview:
    has_host = host != np.uint64(NO_HOST)
    host = np.where(has_host, host, np.uint64(0))
    codes = classes * 2 + has_host
    present = np.flatnonzero(np.bincount(codes))
    place = np.zeros(int(present[-1]) + 1, np.intp)
    place[present] = np.arange(len(present))

    middles = [_middle(int(code), missing) for code in present]
    widths = (16, _width(start), 12, _width(length), max(map(len, middles)), _width(host), 4)
    ends = np.cumsum(widths).tolist()
    templates = np.frombuffer(
        b"".join(
            b"".join(
                text.ljust(width, b"\0")
                for text, width in zip(
                    (b',\n{ "start": ', b"", b', "length": ', b"", middle, b"", b"}"),
                    widths,
                    strict=True,
                )
            )
            for middle in middles
        ),
        np.uint32,
    ).reshape(len(middles), -1)
    rows = templates.take(place[codes], axis=0)
    _write_numbers(rows, ends[1] // 4, start, None)
    _write_numbers(rows, ends[3] // 4, length, None)
    _write_numbers(rows, ends[5] // 4, host, ~has_host)
    flat = rows.view(np.uint8).ravel()
    return memoryview(flat[flat != 0])


def _width(numbers: Numbers) -> int:
    """Bytes for the longest number, a multiple of four."""
    return -(-len(str(int(numbers.max()))) // 4) * 4


def _write_numbers(
    rows: Words, end: int, numbers: Numbers, none: npt.NDArray[np.bool_] | None
) -> None:
    """Write decimal numbers into the words of `rows` that end before column `end`.

    `none`: shape (n,), where nothing is written; the number there must be zero.
    """
    digits = _digits()
    column = end - 1
    zero = _LAST
    rest = numbers
    while True:
        above = rest // np.uint64(_BASE)
        index = (rest - above * np.uint64(_BASE)).astype(np.intp)
        done = above == 0
        index += done * zero
        if none is not None and zero == _LAST:
            index[none] = _SHORT
        rows[:, column] = digits[index]
        if done.all():
            return
        rest, column, zero = above, column - 1, _SHORT


@functools.cache
def _middle(code: int, missing: int | None) -> bytes:
    """What stands between the length and the host offset (or the end), padded to words.

    Args:
        missing: the class (depth and kind) of what a missing file would have held.
    """
    number, has_host = divmod(code, 2)
    depth, kind = divmod(number, _KINDS)
    data = kind in (Kind.DATA, Kind.COMPRESSED)
    fields = {
        "present": data or kind == Kind.ZERO,
        "zero": not data,
        "data": data,
        "compressed": kind == Kind.COMPRESSED,
    }
    if number == missing:
        fields["missing"] = True
    flags = "".join(f', "{name}": {str(is_set).lower()}' for name, is_set in fields.items())
    text = f', "depth": {depth}{flags}' + (', "offset": ' if has_host else "")
    return text.encode("ascii").ljust(-(-len(text) // 4) * 4, b"\0")
