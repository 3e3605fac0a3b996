"""The guest-visible content of a point: bytes as the guest would read them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.chain.parallel import ahead, workers
from qchain.chain.resolve import Runs, runs
from qchain.errors import DataError, Unsupported
from qchain.memory import aligned
from qchain.qcow2.compression import decompress
from qchain.qcow2.entries import Kind, compressed_location

__all__ = ["Piece", "fill", "pieces", "read", "require_content"]

PIECE = 4 << 20
"""Guest bytes handed over at once by `pieces`."""


def require_content(layers: Sequence[Layer]) -> None:
    """Raise `Unsupported` when the data of a layer is encrypted, and not unlocked."""
    for layer in layers:
        if layer.header is None or not layer.header.crypt_method:
            continue
        if layer.header.encryption != "luks":
            # qemu itself opens legacy AES in qemu-img only, to convert it: it is broken.
            name = {"aes": "legacy AES"}.get(layer.header.encryption or "", "unknown")
            why = f"its data is encrypted ({name}), which is not supported"
            raise Unsupported(layer.path, why, "convert it with qemu-img")
        if not isinstance(layer, Qcow2Layer) or layer.cipher is None:
            raise Unsupported(
                layer.path,
                "its data is encrypted (LUKS)",
                "give the passphrase, --secret-file FILE",
            )


def fill(layers: Sequence[Layer], table: Runs, out: memoryview, at: npt.NDArray[np.int64]) -> None:
    """Write the guest bytes of every run of `table` into `out`, run i at offset `at[i]`.

    What `out` held there before does not matter. Reads beyond the end of a file give
    zeroes, as in qemu.
    Raises: `DataError` when a compressed cluster is damaged or a disk fails.
    """
    for start, length, depth, kind, host, place in zip(
        table.start.tolist(),
        table.length.tolist(),
        table.depth.tolist(),
        table.kind.tolist(),
        table.host.tolist(),
        at.tolist(),
        strict=True,
    ):
        view = out[place : place + length]
        if kind == Kind.DATA:
            layers[depth].read_data(view, host)
        elif kind == Kind.COMPRESSED:
            layer = layers[depth]
            assert isinstance(layer, Qcow2Layer)
            _fill_compressed(layer, host, start, view)
        else:
            np.frombuffer(view, np.uint8).fill(0)


def _fill_compressed(layer: Qcow2Layer, descriptor: int, guest: int, out: memoryview) -> None:
    offset, size = compressed_location(descriptor, layer.cluster_bits)
    try:
        cluster = decompress(layer.file.pread(offset, size), layer.cluster_size, layer.compression)
    except ValueError as error:
        raise DataError(
            layer.path, f"compressed cluster at guest offset {guest} is damaged: {error}"
        ) from None
    # A run of one descriptor that covers several clusters repeats the cluster.
    done = 0
    while done < len(out):
        within = (guest + done) % layer.cluster_size
        count = min(layer.cluster_size - within, len(out) - done)
        out[done : done + count] = cluster[within : within + count]
        done += count


def read(layers: Sequence[Layer], start: int, length: int) -> bytes:
    """Guest bytes [start, start + length) of the disk of `layers` (active first).

    Cut at the end of the disk.
    Raises: `ImageError` when an image cannot be read.
    """
    require_content(layers)
    end = min(start + length, layers[0].size)
    if end <= start:
        return b""
    out = aligned(end - start)
    view = memoryview(out.data)
    for table in runs(layers, start, end):
        fill(layers, table, view, table.start - start)
    return out.tobytes()


class Piece:
    """Consecutive guest bytes: `data` of shape (length,), or None where all is zero."""

    __slots__ = ("data", "length", "start")

    def __init__(self, start: int, length: int, data: npt.NDArray[np.uint8] | None) -> None:
        self.start = start
        self.length = length
        self.data = data


def _cut(table: Runs) -> Iterator[tuple[int, int, Runs | None]]:
    """Cut a table into (start, end, runs), runs None where nothing but zeroes is read."""
    begin, end = int(table.start[0]), int(table.start[-1] + table.length[-1])
    has_data = (table.kind == Kind.DATA) | (table.kind == Kind.COMPRESSED)
    starts, ends = table.start, table.start + table.length
    position = begin
    while position < end:
        first = int(np.searchsorted(ends, position, "right"))
        if not has_data[first]:
            # Jump over all the zero runs that follow at once.
            later = np.flatnonzero(has_data[first:])
            stop = end if not len(later) else int(starts[first + int(later[0])])
            yield position, stop, None
        else:
            stop = min(position // PIECE * PIECE + PIECE, end)
            last = int(np.searchsorted(starts, stop, "left"))
            part = Runs(*(getattr(table, name)[first:last] for name in Runs.__slots__))
            yield position, stop, part.clip(position, stop)
        position = stop


def pieces(
    layers: Sequence[Layer],
    start: int = 0,
    end: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Piece]:
    """The guest-visible content from `start` to `end`, in order, read ahead by threads.

    Pieces of zeroes may be of any length and carry no data; others hold at most
    4 MiB. Memory is bounded by the few pieces read ahead.
    """
    require_content(layers)
    size = layers[0].size if end is None else min(end, layers[0].size)

    def load(cut: tuple[int, int, Runs | None]) -> Piece:
        low, high, part = cut
        if part is None:
            return Piece(low, high - low, None)
        data = aligned(high - low)
        fill(layers, part, memoryview(data.data), part.start - low)
        return Piece(low, high - low, data)

    cuts = itertools.chain.from_iterable(map(_cut, runs(layers, start, end)))
    with contextlib.closing(ahead(load, cuts, workers() + 1)) as loaded:
        for piece in loaded:
            if progress is not None:
                progress(piece.start + piece.length, size)
            yield piece
