"""All processors at work on one run, each process watched: for hangs, for its end, for finds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz.finds import confirm, minimise, mutant_of, save
from fuzz.stage import place_for_files
from fuzz.worker import Failure, Field, Plan, work

__all__ = ["Result", "run"]

_POLL = 0.05
_KEPT = 2
"""Finds of one cause that are made small and kept; the others are only counted."""


@dataclass
class Result:
    """What a run found. `peak`: bytes that the image which took most of it took of memory."""

    done: int = 0
    opened: int = 0
    commands: int = 0
    peak: int = 0
    seconds: float = 0.0
    finds: Counter[str] = field(default_factory=Counter)
    kept: list[Path] = field(default_factory=list)
    false_alarms: int = 0
    """Images that were stopped after their time and then, alone, were quick: a busy machine."""


class _Worker:
    """One process, and what it shares with us."""

    def __init__(self, plan: Plan, number: int, step: int, place: Path) -> None:
        self._plan, self._step, self._place = plan, step, place / str(number)
        self.context = multiprocessing.get_context("fork")
        self.state: Any = self.context.RawArray("q", int(Field.COUNT))
        self.state[Field.SEED] = plan.first + number
        self._round = 0
        self.start(plan.first + number)

    def start(self, seed: int) -> None:
        place = self._place / str(self._round)
        self._round += 1
        place.mkdir(parents=True)
        self.here, there = self.context.Pipe(duplex=False)
        self.state[Field.SINCE] = 0
        self.process = self.context.Process(
            target=work, args=(self._plan, seed, self._step, place, self.state, there), daemon=True
        )
        self.process.start()
        there.close()

    @property
    def hangs(self) -> bool:
        since = self.state[Field.SINCE]
        return bool(since) and time.monotonic_ns() - since > self._plan.seconds * 1e9

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def run(
    plan: Plan,
    workers: int | None = None,
    keep: Path | None = None,
    progress: Callable[[Result], None] | None = None,
) -> Result:
    """Do the whole plan. Finds are kept in `keep`; `progress` hears about once a second.

    An interrupt ends the run; what was done until then is the result.
    """
    count = workers or len(os.sched_getaffinity(0))
    result = Result()
    started = time.monotonic()
    told = started
    with tempfile.TemporaryDirectory(prefix="qchain-fuzz-", dir=place_for_files()) as place:
        active = [_Worker(plan, number, count, Path(place)) for number in range(count)]
        every = list(active)
        try:
            while active:
                time.sleep(_POLL)
                for worker in list(active):
                    if not _tend(plan, worker, count, result, keep):
                        active.remove(worker)
                _sum(every, result)
                result.seconds = time.monotonic() - started
                if progress is not None and time.monotonic() - told > 1:
                    told = time.monotonic()
                    progress(result)
        except KeyboardInterrupt:
            pass
        finally:
            for worker in every:
                worker.stop()
        _sum(every, result)
    return result


def _sum(every: list[_Worker], result: Result) -> None:
    result.done = sum(worker.state[Field.DONE] for worker in every)
    result.opened = sum(worker.state[Field.OPENED] for worker in every)
    result.commands = sum(worker.state[Field.COMMANDS] for worker in every)
    result.peak = max(worker.state[Field.GROWTH] for worker in every)


def _tend(plan: Plan, worker: _Worker, step: int, result: Result, keep: Path | None) -> bool:
    """Hear what a worker has to say, and start it again where it has to be. False: it is done."""
    hung = worker.hangs
    if hung:
        worker.stop()
    ended = not worker.process.is_alive()
    # Only now it no longer changes.
    seed = int(worker.state[Field.SEED])
    _hear(plan, worker.here, result, keep)
    if not ended and not hung:
        return True
    worker.here.close()
    if not hung and worker.process.exitcode == 0:
        return False
    if hung:
        failure = Failure("hang", f"over {plan.seconds:g} s", "")
    else:
        code = worker.process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        failure = Failure("crash", name, "the process ended")
    _found(plan, seed, failure, result, keep)
    worker.state[Field.DONE] += 1
    if seed + step < plan.end:
        worker.start(seed + step)
        return True
    return False


def _hear(plan: Plan, here: Connection, result: Result, keep: Path | None) -> None:
    try:
        while here.poll():
            seed, failure = here.recv()
            _found(plan, seed, failure, result, keep)
    except (EOFError, OSError):
        pass


def _found(plan: Plan, seed: int, failure: Failure, result: Result, keep: Path | None) -> None:
    cause = f"{failure.kind}: {failure.where}"
    if failure.kind != "hang" and result.finds[cause] >= _KEPT:
        result.finds[cause] += 1
        return
    mutant = mutant_of(plan, seed)
    if failure.kind != "command":
        again = confirm(plan, seed, mutant)
        if again is None and failure.kind == "hang":
            result.false_alarms += 1
            return
        failure = again or failure
        cause = f"{failure.kind}: {failure.where}"
    result.finds[cause] += 1
    if keep is None or result.finds[cause] > _KEPT:
        return
    if failure.kind != "command":
        mutant = minimise(plan, seed, mutant, failure)
    result.kept.append(save(plan, seed, mutant, failure, keep))
