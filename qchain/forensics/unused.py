"""Host clusters of an image that nothing refers to: where old data stays, and data can hide.

- leaked: counted as used, but nothing refers to it.
- free: not used any more, before the last used cluster; often holds what was there before.
- slack: from the end of the last used cluster to the end of the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qchain.hostfile import HostFile
from qchain.qcow2.header import Header
from qchain.qcow2.refcounts import BadBlock, refcount_blocks

__all__ = ["UnusedRange", "unused_ranges"]


@dataclass(frozen=True, slots=True)
class UnusedRange:
    """`kind`: 'leaked', 'free' or 'slack'; `start` and `length`: bytes of the host file."""

    kind: str
    start: int
    length: int


def unused_ranges(
    file: HostFile, header: Header, leaked: list[tuple[int, int]]
) -> list[UnusedRange]:
    """All unreferenced ranges of an image, in file order, cut at the end of the file.

    Args:
        leaked: (start, length) of the leaked clusters (`qchain.qcow2.check`).

    Raises: `ImageError` when the refcount table is not where one can be.
    """
    size = header.cluster_size
    found = [UnusedRange("leaked", start, length) for start, length in leaked]
    used_end = size  # the header's cluster is used, whatever the refcounts say
    free: list[tuple[int, int]] = []
    for start, end, is_used in _spans(file, header):
        if is_used:
            used_end = max(used_end, end)
        elif free and free[-1][1] == start:
            free[-1] = free[-1][0], end
        else:
            free.append((start, end))
    for start, end in free:
        end = min(end, used_end)
        if start < end:
            found.append(UnusedRange("free", start, end - start))
    if used_end < file.size:
        found.append(UnusedRange("slack", used_end, file.size - used_end))
    cut = [
        UnusedRange(each.kind, each.start, min(each.length, file.size - each.start))
        for each in found
        if each.start < file.size
    ]
    return sorted(cut, key=lambda each: each.start)


def _spans(file: HostFile, header: Header) -> Iterator[tuple[int, int, bool]]:
    """(start, end, used) of equal neighbours in file order, within the file; gaps are free."""
    size = header.cluster_size
    clusters = -(-file.size // size)
    position = 0
    bad: list[BadBlock] = []
    for first, counts in refcount_blocks(file, header, bad):
        if first >= clusters:
            break
        if position < first:
            yield position * size, first * size, False
        used = counts[: clusters - first] != 0
        edges = [0, *(np.flatnonzero(np.diff(used)) + 1).tolist(), len(used)]
        for low, high in itertools.pairwise(edges):
            if low < high:
                yield (first + low) * size, (first + high) * size, bool(used[low])
        position = first + len(used)
    if position < clusters:
        yield position * size, clusters * size, False
