"""Work on the windows of a disk by several threads, the answers in the order of the windows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["in_order", "thread_pool", "workers"]

_KEPT = 16 << 20

_FEW = 4
"""Fewer windows than this are done before a pool of threads would be ready."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def workers() -> int:
    """Threads worth having: numpy and pread release the interpreter's lock."""
    return max(1, min(8, len(os.sched_getaffinity(0))))


def thread_pool() -> ThreadPoolExecutor:
    """`workers()` threads, whose large arrays are allocated without page faults.

    glibc's malloc maps every large block anew and gives the top of the heap back at once,
    until it has seen a larger block freed (mallopt(3), M_MMAP_THRESHOLD): then it keeps what
    windows use over and over. This block is never touched, so it costs nothing.
    """
    # Imported late: small images are described before this would be loaded.
    from concurrent.futures import ThreadPoolExecutor

    np.empty(_KEPT, np.uint8)
    return ThreadPoolExecutor(workers())


def in_order(function: Callable[[Item], Answer], items: Sequence[Item]) -> Iterator[Answer]:
    """`function` of each item. Raises what it raises, in its turn."""
    if len(items) < _FEW:
        yield from map(function, items)
        return
    with thread_pool() as pool:
        yield from pool.map(function, items)
