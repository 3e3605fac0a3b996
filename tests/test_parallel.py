"""Threads that work ahead, and the memory that they read into."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from qchain.chain.parallel import ahead
from qchain.memory import aligned


def counted(taken: list[int], count: int) -> Iterator[int]:
    for item in range(count):
        taken.append(item)
        yield item


def test_answers_come_in_order_and_not_too_many() -> None:
    taken: list[int] = []

    def slow_at_first(item: int) -> int:
        time.sleep(0.003 if item % 5 == 0 else 0)
        return item * item

    for index, answer in enumerate(ahead(slow_at_first, counted(taken, 200), 4)):
        assert answer == index * index
        assert len(taken) - index <= 5
    assert len(taken) == 200


def test_an_error_comes_in_its_turn() -> None:
    taken: list[int] = []
    got: list[int] = []
    before = threading.active_count()

    def fails(item: int) -> int:
        if item == 7:
            raise ValueError("seven")
        return item

    with pytest.raises(ValueError, match="seven"):
        for answer in ahead(fails, counted(taken, 1000), 3):
            got.append(answer)
    assert got == list(range(7))
    assert len(taken) <= 7 + 4
    assert threading.active_count() == before


def test_an_error_of_the_items_ends_the_threads() -> None:
    before = threading.active_count()

    def items() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(ahead(abs, items(), 3))
    assert threading.active_count() == before


def test_leaving_early_leaves_the_rest_undone() -> None:
    done: list[int] = []
    before = threading.active_count()

    def slow(item: int) -> int:
        time.sleep(0.01)
        done.append(item)
        return item

    answers = ahead(slow, itertools.count(), 50)
    assert next(answers) == 0
    answers.close()
    assert threading.active_count() == before
    # Some 50 were handed over; those that no thread had begun are never done.
    assert len(done) < 50


@pytest.mark.parametrize("length", [1, 512, 4096, 1 << 20, (4 << 20) + 3])
def test_memory_is_aligned(length: int) -> None:
    """Several at once, of which malloc would put some elsewhere."""
    kept = [aligned(length) for _ in range(5)]
    assert all(len(each) == length and each.ctypes.data % 64 == 0 for each in kept)
    for number, each in enumerate(kept):
        each.fill(number)
    assert all((each == number).all() for number, each in enumerate(kept))
