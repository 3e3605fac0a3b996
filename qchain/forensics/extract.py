"""Raw guest-visible content into a file or a pipe, sparse where it is zero."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer
from qchain.chain.reader import pieces
from qchain.errors import UsageError
from qchain.forensics.newfile import new_file

__all__ = ["extract_to_file", "extract_to_stream"]

BLOCK = 4096
_ZEROES = bytes(1 << 20)


def _span(layers: Sequence[Layer], start: int, length: int | None) -> int:
    size = layers[0].size
    end = size if length is None else start + length
    if not 0 <= start <= end <= size:
        raise UsageError(
            f"range {start}:{end - start}", f"lies outside the disk of {size} bytes", "cut it"
        )
    return end


def _write_sparse(fd: int, data: npt.NDArray[np.uint8], offset: int) -> None:
    """Write the blocks of `data` that are not all zero."""
    whole = len(data) // BLOCK * BLOCK
    used = np.zeros(-(-len(data) // BLOCK), bool)
    used[: whole // BLOCK] = data[:whole].reshape(-1, BLOCK).any(axis=1)
    if whole < len(data):
        used[-1] = data[whole:].any()
    edges = np.flatnonzero(np.diff(np.concatenate(([0], used.view(np.int8), [0]))))
    for low, high in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        view = memoryview(data.data)[low * BLOCK : high * BLOCK]
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + low * BLOCK + done)


def extract_to_file(
    layers: Sequence[Layer],
    output: Path,
    start: int = 0,
    length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write guest bytes [start, start + length) to the new file `output`; returns how many.

    Nothing stays behind when it fails.

    Raises: `UsageError` for a range outside the disk; `ImageError` when the content cannot
        be read; as `newfile.new_file`.
    """
    end = _span(layers, start, length)
    with new_file(output) as stream:
        stream.truncate(end - start)
        for piece in pieces(layers, start, end, progress):
            if piece.data is not None:
                _write_sparse(stream.fileno(), piece.data, piece.start - start)
    return end - start


def extract_to_stream(
    layers: Sequence[Layer],
    stream: BinaryIO,
    start: int = 0,
    length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """As `extract_to_file`, into a pipe: zeroes are written out."""
    end = _span(layers, start, length)
    for piece in pieces(layers, start, end):
        done = piece.start + piece.length
        if piece.data is not None:
            stream.write(piece.data.data)
        else:
            left = piece.length
            while left:
                left -= stream.write(memoryview(_ZEROES)[: min(left, len(_ZEROES))])
                if progress is not None:
                    progress(done - left, end)
        if progress is not None:
            progress(done, end)
    return end - start
