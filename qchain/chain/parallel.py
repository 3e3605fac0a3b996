"""Work on the windows of a disk by several threads, the answers in the order of the windows."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["ahead", "in_order", "thread_pool", "workers"]

_KEPT = 16 << 20

_FEW = 4
"""Fewer windows than this are done before threads would be ready."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def workers() -> int:
    """Threads worth having: numpy and pread release the interpreter's lock."""
    return max(1, min(8, len(os.sched_getaffinity(0))))


def _keep_memory() -> None:
    """Let large arrays be allocated without page faults from now on.

    glibc's malloc maps every large block anew and gives the top of the heap back at once,
    until it has seen a larger block freed (mallopt(3), M_MMAP_THRESHOLD): then it keeps what
    windows use over and over. This block is never touched, so it costs nothing.
    """
    np.empty(_KEPT, np.uint8)


def thread_pool() -> ThreadPoolExecutor:
    """`workers()` threads, with memory kept."""
    # Imported late: small images are described before this would be loaded.
    from concurrent.futures import ThreadPoolExecutor

    _keep_memory()
    return ThreadPoolExecutor(workers())


_Slot: TypeAlias = "SimpleQueue[tuple[Answer, None] | tuple[None, BaseException]]"


def ahead(
    function: Callable[[Item], Answer], items: Iterable[Item], depth: int
) -> Generator[Answer, None, None]:
    """`function` of each item in order, by threads that are at most `depth` items ahead.

    Items are taken as they are needed, in the caller's thread. What is handed on are a few
    megabytes at a time: futures would cost more than reading them.

    Raises: what `function` raises, in its turn. Who leaves early waits for what is begun, no more.
    """
    _keep_memory()
    todo: SimpleQueue[tuple[Item, _Slot[Answer]] | None] = SimpleQueue()
    over = threading.Event()

    def work() -> None:
        while (job := todo.get()) is not None and not over.is_set():
            item, slot = job
            try:
                slot.put((function(item), None))
            except BaseException as error:
                slot.put((None, error))

    most = workers()
    threads: list[threading.Thread] = []
    waiting: deque[_Slot[Answer]] = deque()
    try:
        for item in items:
            slot: _Slot[Answer] = SimpleQueue()
            waiting.append(slot)
            todo.put((item, slot))
            if len(threads) < most:
                thread = threading.Thread(target=work, daemon=True)
                thread.start()
                threads.append(thread)
            if len(waiting) > depth:
                yield _answer(waiting.popleft())
        while waiting:
            yield _answer(waiting.popleft())
    finally:
        over.set()
        for _ in threads:
            todo.put(None)
        for thread in threads:
            thread.join()


def _answer(slot: _Slot[Answer]) -> Answer:
    answer, error = slot.get()
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


def in_order(function: Callable[[Item], Answer], items: Sequence[Item]) -> Iterator[Answer]:
    """`function` of each item. Raises what it raises, in its turn."""
    if len(items) < _FEW:
        yield from map(function, items)
        return
    yield from ahead(function, items, 2 * workers())
