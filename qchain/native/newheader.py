"""Headers as the native engine writes them: of a new file, and the one that switches an old one.

A switch is one write of the first 512 bytes, which a disk takes as a whole or not at all. What
does not lie in them, the backing name above all, must be in place beforehand, where nothing was.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from qchain.qcow2.extensions import BACKING_FORMAT, FEATURE_NAMES, Extension
from qchain.qcow2.header import Header
from qchain.qcow2.heads import MAGIC

__all__ = ["SECTOR", "Tables", "new_header", "switched_header"]

SECTOR = 512
_HEAD = struct.Struct(">4sIQIIQIIQQIIQ")
_TAIL = struct.Struct(">QQQIIB7x")
_KNOWN_AUTOCLEAR = 3


@dataclass(frozen=True, slots=True)
class Tables:
    """Where the tables of the result are: offsets in bytes, `l1_size` in entries, the refcount
    table's size in clusters. `size`: of the disk, in bytes."""

    size: int
    l1_offset: int
    l1_size: int
    refcount_offset: int
    refcount_clusters: int


def new_header(like: Header, tables: Tables, name: str | None, fmt: str | None) -> bytes:
    """The first bytes of a new image with the features of one that has the header `like`.

    Raises: `ValueError` where the first cluster has no room for the backing name.
    """
    extensions = [each for each in like.extensions if each.type == FEATURE_NAMES]
    for kept in (extensions, []):
        area = _extensions(kept, fmt if name is not None else None)
        length = _length(like)
        place = length + len(area)
        encoded = os.fsencode(name) if name is not None else b""
        if place + len(encoded) <= like.cluster_size:
            head = _head(like, tables, (place if encoded else 0, len(encoded)), length, 0)
            return head + area + encoded
    raise ValueError(f"no room for a backing name of {len(encoded)} bytes")


def switched_header(
    area: bytes, header: Header, tables: Tables, name: str | None, fmt: str | None
) -> tuple[bytes, tuple[int, bytes] | None]:
    """The first 512 bytes of an image that is led to other tables and to another backing file.

    Args:
        area: its first cluster as it is.

    Returns: the sector, and what must be in place before it is written: (offset, bytes).
    Raises: `ValueError` where it does not fit.
    """
    length = max(header.header_length, 72 if header.version == 2 else 104)
    encoded = os.fsencode(name) if name is not None else b""
    others = [each for each in header.extensions if each.type != BACKING_FORMAT]
    bare = [each for each in others if each.type != FEATURE_NAMES]
    limit = min(SECTOR, header.cluster_size)
    for kept in (others, bare):
        extensions = _extensions(kept, fmt if name is not None else None)
        place = length + len(extensions)
        if place > limit:
            continue
        before = None
        if place + len(encoded) > limit and encoded:
            place = _free_place(header, len(encoded))
            before = (place, encoded)
        head = area[:length]
        fields = _head(header, tables, (place if encoded else 0, len(encoded)),
                       header.header_length, header.autoclear & _KNOWN_AUTOCLEAR)  # fmt: skip
        head = fields[: min(len(fields), length)] + head[len(fields) :]
        sector = head + extensions + (b"" if before else encoded)
        # What else the sector holds means nothing, but for the data of small clusters.
        return sector.ljust(limit, b"\0"), before
    raise ValueError("its header extensions do not fit the first 512 bytes")


def _free_place(header: Header, length: int) -> int:
    """Where in the first cluster, behind the first sector, a name of `length` bytes can be put.

    Raises: `ValueError` where there is no room.
    """
    end = header.header_length + sum(8 + -(-len(e.data) // 8) * 8 for e in header.extensions) + 8
    if header.backing_name is not None:
        old = header.backing_file_offset
        size = len(os.fsencode(header.backing_name))
        if max(SECTOR, end) + length <= old:
            return max(SECTOR, end)
        end = max(end, old + size)
    place = -(-max(SECTOR, end) // 8) * 8
    if place + length > header.cluster_size:
        raise ValueError(f"its header has no room for a backing name of {length} bytes")
    return place


def _length(like: Header) -> int:
    return 72 if like.version == 2 else 112


def _extensions(others: Iterable[Extension], fmt: str | None) -> bytes:
    out = b""
    if fmt is not None:
        out += _extension(BACKING_FORMAT, fmt.encode())
    return out + b"".join(_extension(each.type, each.data) for each in others) + bytes(8)


def _extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def _head(
    like: Header, tables: Tables, backing: tuple[int, int], length: int, autoclear: int
) -> bytes:
    out = _HEAD.pack(
        MAGIC, like.version, *backing, like.cluster_bits, tables.size, 0, tables.l1_size,
        tables.l1_offset, tables.refcount_offset, tables.refcount_clusters, 0, 0,
    )  # fmt: skip
    if like.version == 2:
        return out
    out += _TAIL.pack(
        like.incompatible, like.compatible, autoclear, like.refcount_order, length,
        like.compression_type,
    )  # fmt: skip
    return out[:length]
