"""Compressed clusters: raw deflate (compression type 0) and zstd (type 1)."""

from __future__ import annotations

import zlib

__all__ = ["decompress"]


def decompress(data: bytes, cluster_size: int, compression: str) -> bytes:
    """One cluster from its compressed form.

    Args:
        data: the compressed bytes; what follows the end of the stream is ignored,
            because the size is recorded in whole sectors.
        compression: "zlib" or "zstd".

    Returns: exactly `cluster_size` bytes. Output stops there, so that a bomb cannot
        make memory grow.
    Raises: ValueError when the stream is damaged or too short.
    """
    if compression == "zlib":
        try:
            # The specification asks for a window of 12 bits; qemu's writer uses it.
            out = zlib.decompressobj(wbits=-12).decompress(data, cluster_size)
        except zlib.error as error:
            raise ValueError(str(error)) from None
    else:
        import zstandard

        try:
            with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data) as reader:
                out = reader.read(cluster_size)
        except (zstandard.ZstdError, MemoryError) as error:
            raise ValueError(str(error)) from None
    if len(out) != cluster_size:
        raise ValueError(f"stream ends after {len(out)} of {cluster_size} bytes")
    return out
