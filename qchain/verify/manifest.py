"""A manifest: the digest of every piece of a point, taken before a merge and checked after it.

It needs nothing of the old files: what was damaged without being moved shows too, and it can be
kept as evidence. The file, sparse where the guest reads zeroes:

    0       JSON, padded with spaces to 4096 bytes, a newline last:
            {"qchain_manifest": 1, "algorithm": "sha256", "unit": 65536, "virtual_size": ...}
    4096    32 bytes for each 65536 guest bytes, in order: their SHA-256 (of the last piece, as
            long as it is); 32 zero bytes where all of them are zero
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from qchain.chain.layer import Layer
from qchain.chain.parallel import ahead, workers
from qchain.chain.reader import read, require_content
from qchain.chain.resolve import runs
from qchain.errors import ImageError
from qchain.hostfile import HostFile
from qchain.qcow2.entries import Kind
from qchain.verify.compare import Comparison

__all__ = ["UNIT", "check_manifest", "manifest_bytes", "take_manifest"]

UNIT = 64 << 10
"""Guest bytes of one digest."""
_HEAD = 4096
_DIGEST = 32
_BLOCK = 4 << 20
"""Guest bytes that a thread reads and digests at once."""
_OF_BLOCK = _BLOCK // UNIT * _DIGEST
_ZERO = bytes(UNIT)

Progress = Callable[[int, int], None]


def manifest_bytes(size: int) -> int:
    """The most that the manifest of a disk of `size` bytes takes."""
    return _HEAD + -(-size // UNIT) * _DIGEST


def take_manifest(layers: Sequence[Layer], fd: int, progress: Progress | None = None) -> None:
    """Write the manifest of the point of `layers` (active first) to the empty file `fd`; durable.

    Raises: `DataError` for what cannot be read, `OSError`.
    """
    size = layers[0].size
    head = {"qchain_manifest": 1, "algorithm": "sha256", "unit": UNIT, "virtual_size": size}
    os.pwrite(fd, json.dumps(head).ljust(_HEAD - 1).encode() + b"\n", 0)
    for block, digests in _digests(layers):
        if digests.strip(b"\0"):
            os.pwrite(fd, digests, _HEAD + block * _OF_BLOCK)
        if progress is not None:
            progress(min((block + 1) * _BLOCK, size), size)
    os.ftruncate(fd, manifest_bytes(size))
    os.fsync(fd)
    if progress is not None:
        progress(size, size)


def check_manifest(
    path: Path, layers: Sequence[Layer], progress: Progress | None = None
) -> Comparison:
    """Hold the point of `layers` against a manifest; differences in pieces of `UNIT` bytes.

    Raises: `ImageError` for a file that is no manifest, or one of a disk of another size;
        `DataError` for what cannot be read.
    """
    size = layers[0].size
    found = Comparison()
    with HostFile(path) as file:
        _require(file, size)
        for block, now in _both(_digests(layers), _stored_blocks(file)):
            before = file.pread(_HEAD + block * _OF_BLOCK, _OF_BLOCK).ljust(_OF_BLOCK, b"\0")
            start = block * _BLOCK
            length = min(_BLOCK, size - start)
            found.compared_bytes += length
            if before != now:
                for at in range(0, length, UNIT):
                    place = at // UNIT * _DIGEST
                    if before[place : place + _DIGEST] != now[place : place + _DIGEST]:
                        piece = min(UNIT, length - at)
                        found.add(start + at, piece, piece, start + at)
            if progress is not None:
                progress(start + length, size)
    found.skipped_bytes = size - found.compared_bytes
    return found


def _require(file: HostFile, size: int) -> None:
    try:
        head = json.loads(file.pread(0, _HEAD))
        known = (head["qchain_manifest"], head["algorithm"], head["unit"])
        whole = head["virtual_size"]
    except (ValueError, LookupError, TypeError, RecursionError):
        known, whole = None, None
    if known != (1, "sha256", UNIT):
        raise ImageError(file.path, "is not a manifest that this version of qchain writes", "")
    if whole != size:
        raise ImageError(
            file.path, f"is the manifest of a disk of {whole} bytes, and this one has {size}", ""
        )


def _digests(layers: Sequence[Layer]) -> Iterator[tuple[int, bytes]]:
    """(number, digests) of every block of `_BLOCK` bytes in which there may be data, in order."""
    require_content(layers)
    size = layers[0].size

    def digest(block: int) -> tuple[int, bytes]:
        start = block * _BLOCK
        data = memoryview(read(layers, start, min(_BLOCK, size - start)))
        return block, b"".join(
            _digest(data[at : at + UNIT]) for at in range(0, len(data), UNIT)
        ).ljust(_OF_BLOCK, b"\0")

    with contextlib.closing(ahead(digest, _blocks(layers), workers() + 1)) as done:
        yield from done


def _digest(piece: memoryview) -> bytes:
    # Most pieces are told from zeroes by their first bytes.
    if piece[:8] == _ZERO[:8] and piece == _ZERO[: len(piece)]:
        return bytes(_DIGEST)
    return hashlib.sha256(piece).digest()


def _blocks(layers: Sequence[Layer]) -> Iterator[int]:
    last = -1
    for table in runs(layers, 0, layers[0].size):
        data = (table.kind == Kind.DATA) | (table.kind == Kind.COMPRESSED)
        first = table.start[data] // _BLOCK
        end = (table.start[data] + table.length[data] - 1) // _BLOCK + 1
        # Runs are in order, and a long one covers many blocks.
        for low, high in zip(first.tolist(), end.tolist(), strict=True):
            yield from range(max(low, last + 1), high)
            last = max(last, high - 1)


def _stored_blocks(file: HostFile) -> Iterator[int]:
    """The blocks of which the manifest has digests, in order."""
    window = _OF_BLOCK * 256
    last = -1
    for low, high in file.data_ranges(_HEAD, file.size):
        begin = max(last + 1, (low - _HEAD) // _OF_BLOCK) * _OF_BLOCK
        for at in range(begin, high - _HEAD, window):
            data = file.pread(_HEAD + at, window)
            whole = np.frombuffer(data.ljust(-(-len(data) // _OF_BLOCK) * _OF_BLOCK, b"\0"), "u8")
            used = np.flatnonzero(whole.reshape(-1, _OF_BLOCK // 8).any(axis=1))
            for number in (used + at // _OF_BLOCK).tolist():
                if number > last:
                    last = number
                    yield number


def _both(now: Iterator[tuple[int, bytes]], before: Iterator[int]) -> Iterator[tuple[int, bytes]]:
    """The blocks of either, in order: with their digests now, zeroes where there is no data."""
    nothing = bytes(_OF_BLOCK)
    waiting = next(before, None)
    for block, digests in itertools.chain(now, [(1 << 62, nothing)]):
        while waiting is not None and waiting <= block:
            if waiting < block:
                yield waiting, nothing
            waiting = next(before, None)
        if block < 1 << 62:
            yield block, digests
