"""How far a whole merge is, from how far each of its steps is.

step    commit 300     pull 100   verify 400
whole   0 ---- 300 ---- 400 ------------ 800      the total is known before anything begins
"""

from __future__ import annotations

from collections.abc import Iterable

from qchain.plan.steps import Command, Compare, NativeCopy, NativeWrite, Step, TakeManifest
from qchain.run.group import Observer

__all__ = ["Whole", "weight_of"]


_MOVING = (Command, Compare, NativeCopy, NativeWrite, TakeManifest)


def weight_of(steps: Iterable[Step]) -> int:
    """Bytes that all of these steps are expected to move and to compare."""
    return sum(step.weight for step in steps if isinstance(step, _MOVING))


class Whole:
    """An observer of steps that tells another one of the whole: its total never changes.

    What is done grows, and ends at the total at most, even where recovery repeats a step.
    """

    def __init__(self, observer: Observer, total: int) -> None:
        """`total`: the bytes expected of all steps (`weight_of`)."""
        self._observer, self._total = observer, total
        self._before = self._weight = self._done = 0

    def step(self, label: str, total: int, done: int = 0) -> None:
        """A step begins, so that the one before has ended."""
        self._before += self._weight
        self._weight = total
        self._observer.step(label, self._total, self._at(done))

    def advance(self, done: int, total: int) -> None:
        """How far the present step is, in bytes of whatever kind."""
        part = min(done / total, 1.0) if total else 1.0
        self._observer.advance(self._at(int(part * self._weight)), self._total)

    def _at(self, done: int) -> int:
        self._done = max(self._done, min(self._before + done, self._total))
        return self._done
