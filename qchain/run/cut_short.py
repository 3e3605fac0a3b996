"""A target that qemu-img is cutting, and is killed: its tables may still map what lies beyond.

The length in the header is written before the L2 tables are (qemu 7.2). Nobody sees what they map
beyond it, until the image grows again: then clusters would be there that belong to others. The same
cut once more does nothing, for the length is right; so the image grows first, and is cut again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qchain.errors import FailedMidway
from qchain.hostfile import HostFile
from qchain.plan.commands import resize_shrink_argv
from qchain.qcow2.header import read_header
from qchain.qcow2.tables import MapTables

__all__ = ["cut_again", "mapped_beyond"]


def mapped_beyond(path: Path) -> int | None:
    """The guest offset at which the last L2 table with an entry beyond the length ends, in bytes.

    None: nothing is mapped beyond it. Raises `ImageError` for a table outside the file.
    """
    with HostFile(path) as file:
        header = read_header(file)
        per_table = header.cluster_size // (16 if header.extended_l2 else 8)
        span = header.cluster_size * per_table
        tables = MapTables(
            file, header, header.l1_table_offset, header.l1_size, size=header.l1_size * span
        )
        end = None
        first = -(-header.size // header.cluster_size)
        while first < tables.clusters:
            last = min((first // per_table + 1) * per_table, tables.clusters)
            words = tables.entries(first, last)
            if words is not None and words.any():
                end = last * header.cluster_size
            first = max(last, tables.next_table(last))
    return end


def cut_again(path: Path, size: int, resize: Callable[[list[str]], None]) -> None:
    """Let nothing be mapped beyond `size` bytes, its length; `resize` has qemu-img do a command.

    Raises: `FailedMidway` when there still is.
    """
    end = mapped_beyond(path)
    if end is None:
        return
    resize(resize_shrink_argv(path, "qcow2", end))
    resize(resize_shrink_argv(path, "qcow2", size))
    if mapped_beyond(path) is not None:
        raise FailedMidway(path, "still maps data beyond its end after it was cut")
