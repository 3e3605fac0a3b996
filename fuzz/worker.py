"""The process that reads mutants, one after the other, until it is told to stop or killed."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fixtures.hostile import mutate
from fixtures.shapes import Shape
from fuzz.probe import Probe
from fuzz.stage import Stage

__all__ = ["Failure", "Field", "Plan", "Prober", "failure_of", "memory_growth", "work"]

COMMANDS: Sequence[Sequence[str]] = (
    ("info", "--json"),
    ("check",),
    ("chain", "--json"),
    ("map", "--json"),
    ("plan", "--flatten"),
    ("tree",),
    ("leaks", "--json"),
    ("map", "--layer"),
    ("info",),
)
_CODES = (0, 1, 3, 4)
_ADDRESS_SPACE = 4 << 30
"""More than this a worker cannot have: what asks for it gets `MemoryError`, not the machine."""
_RESET_ABOVE = 32 << 20

Prober = Callable[[Path, int, bytes | None], Probe]


class Field(IntEnum):
    """What a worker tells its watchman, in shared memory."""

    SEED = 0
    SINCE = 1  # monotonic ns at which the image was begun; 0: not to be watched
    DONE = 2
    OPENED = 3
    COMMANDS = 4
    GROWTH = 5  # the most bytes of memory that one image took
    COUNT = 6


@dataclass(frozen=True)
class Failure:
    """Why an image is a find: `kind` exception, hang, memory, crash or command; where; how."""

    kind: str
    where: str
    detail: str


@dataclass(frozen=True)
class Plan:
    """What a run does. `memory` in bytes, `seconds` for one image."""

    shapes: Sequence[Shape]
    probe: Prober
    first: int
    count: int
    memory: int = 300 << 20
    seconds: float = 2.0
    command_every: int = 500

    @property
    def end(self) -> int:
        return self.first + self.count


def work(plan: Plan, seed: int, step: int, place: Path, state: Any, out: Connection) -> None:
    """Read the mutants of `seed`, `seed` + `step`, ...; failures go to `out` as (seed, failure).

    `state`: shared numbers, one for each `Field`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    memory_growth()  # measured from here on, the first image too
    stages: dict[int, Stage] = {}
    try:
        while seed < plan.end:
            index = seed % len(plan.shapes)
            if index not in stages:
                stages[index] = Stage(place / str(index), plan.shapes[index])
            _one(plan, seed, stages[index], state, out)
            seed += step
        state[Field.SEED] = seed
    finally:
        state[Field.SINCE] = 0
        out.close()


def _one(plan: Plan, seed: int, stage: Stage, state: Any, out: Connection) -> None:
    mutate(stage.drafts, seed, str(stage.directory))
    stage.show()
    state[Field.SEED] = seed
    state[Field.SINCE] = time.monotonic_ns()
    failure, opened, growth = failure_of(plan, stage, seed)
    state[Field.SINCE] = 0
    if failure is None and plan.command_every and seed % plan.command_every == 0:
        failure = _command(stage, seed // plan.command_every)
        state[Field.COMMANDS] += 1
    if failure is not None:
        out.send((seed, failure))
    state[Field.OPENED] += opened
    state[Field.GROWTH] = max(state[Field.GROWTH], growth)
    state[Field.DONE] += 1
    stage.clear()


def failure_of(plan: Plan, stage: Stage, seed: int) -> tuple[Failure | None, bool, int]:
    """What the library makes of the image on the stage: (why it is a find, opened, growth)."""
    failure, opened = None, False
    try:
        # Shapes take turns: the number within one shape chooses what else is done.
        number = seed // len(plan.shapes)
        opened = plan.probe(stage.image, number, stage.drafts.shape.secret).opened
    except MemoryError as error:
        failure = Failure("memory", _where(error), traceback.format_exc())
    except Exception as error:
        failure = Failure("exception", _where(error), traceback.format_exc())
    growth = memory_growth()
    if failure is None and growth > plan.memory:
        failure = Failure(
            "memory", f"over {plan.memory >> 20} MiB", f"memory grew by {growth} bytes"
        )
    return failure, opened, growth


def _where(error: BaseException) -> str:
    """Type and place, by which finds of one cause are told from others: our innermost line."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/qchain/" in frame.filename]
    last = (ours or frames)[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"


_base = 0


def memory_growth() -> int:
    """Bytes by which the peak of resident memory rose since the last call that saw it rise."""
    global _base
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    growth = peak - _base
    if growth > _RESET_ABOVE or not _base:
        # The kernel forgets the peak: what follows is measured from what is there now.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        before, _base = _base, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if not before:
            return 0
    return max(0, growth)


def _command(stage: Stage, number: int) -> Failure | None:
    """The image through the real command: a right exit code, one line of error, no traceback.

    Its time is hardly bounded: start-up counts, and other work on the machine.
    """
    words = list(COMMANDS[number % len(COMMANDS)])
    target = stage.directory if words[0] == "tree" else stage.image
    argv = [Path(sys.executable).with_name("qchain"), *words, target]
    environment = {name: value for name, value in os.environ.items() if name != "QCHAIN_DEBUG"}
    try:
        done = subprocess.run(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=20,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Failure("command", f"{words[0]} hangs", " ".join(map(str, argv)))
    said = done.stderr.decode("utf-8", "replace")
    wrong = done.returncode not in _CODES or "Traceback" in said or "internal error" in said
    # With exit code 4 and 3 there is one line; `plan` may say several refusals.
    if not wrong and done.returncode == 4:
        wrong = said.count("\n") != 1 or not said.startswith("qchain: ")
    if wrong:
        where = f"{words[0]} exit {done.returncode}"
        return Failure("command", where, f"{' '.join(map(str, argv))}\n{said[-2000:]}")
    return None
