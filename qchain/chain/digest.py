"""The digest of a point: that of its raw guest-visible content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from qchain.chain.layer import Layer
from qchain.chain.reader import pieces
from qchain.errors import UsageError

__all__ = ["digest"]

_ZEROES = bytes(1 << 20)


def digest(
    layers: Sequence[Layer],
    algorithm: str = "sha256",
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Hexadecimal digest of the whole disk of `layers` (active first), zeroes included.

    Raises: `UsageError` for an algorithm that hashlib does not know or that has no
        digest of fixed length.
    """
    try:
        state = hashlib.new(algorithm, usedforsecurity=False)
    except ValueError:
        known = " ".join(sorted(hashlib.algorithms_guaranteed))
        raise UsageError(algorithm, "no such digest algorithm", f"one of: {known}") from None
    if not state.digest_size:
        raise UsageError(algorithm, "has no fixed length", "use sha256 or another fixed one")
    size = layers[0].size
    for piece in pieces(layers):
        end = piece.start + piece.length
        if piece.data is not None:
            state.update(piece.data.data)
        else:
            left = piece.length
            while left:
                state.update(memoryview(_ZEROES)[: min(left, len(_ZEROES))])
                left -= min(left, len(_ZEROES))
                # A hole may be as long as the disk.
                if progress is not None:
                    progress(end - left, size)
        if progress is not None:
            progress(end, size)
    return state.hexdigest()
