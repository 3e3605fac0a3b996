"""Work on the windows of a disk by several threads, the answers in the order of the windows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ["in_order", "workers"]

_FEW = 4
"""Fewer windows than this are done before a pool of threads would be ready."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def workers() -> int:
    """Threads worth having: numpy and pread release the interpreter's lock."""
    return max(1, min(8, len(os.sched_getaffinity(0))))


def in_order(function: Callable[[Item], Answer], items: Sequence[Item]) -> Iterator[Answer]:
    """`function` of each item. Raises what it raises, in its turn."""
    if len(items) < _FEW:
        yield from map(function, items)
        return
    # Imported late: small images are described before this would be loaded.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(workers()) as pool:
        yield from pool.map(function, items)
