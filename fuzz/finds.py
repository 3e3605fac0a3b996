"""A find made small, told once, and kept as hex text that reproduces it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from fixtures.hexfile import to_hex
from fixtures.hostile import Mutant, mutate
from fuzz.stage import Stage, place_for_files
from fuzz.worker import Failure, Plan, failure_of, memory_growth

__all__ = ["confirm", "minimise", "mutant_of", "save"]

_PATIENCE = 5
"""A process that only waits is stopped after so many times the seconds of an image."""
_GRAIN = 512


def mutant_of(plan: Plan, seed: int) -> Mutant:
    """The mutant that a seed stands for."""
    with _stage(plan, seed) as stage:
        return stage.drafts.mutant(mutate(stage.drafts, seed, str(stage.directory)))


def confirm(plan: Plan, seed: int, mutant: Mutant) -> Failure | None:
    """The mutant once more, alone in a fresh process: why it is a find, None if it is none.

    Of time the processor's counts: the machine may be busy with other work.
    """
    with _stage(plan, seed) as stage:
        stage.drafts.apply(mutant)
        stage.show()
        here, there = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(
            target=_alone, args=(plan, stage, seed, there)
        )
        child.start()
        there.close()
        try:
            return _await(plan, child, here)
        finally:
            child.kill()
            child.join()
            here.close()


def _alone(plan: Plan, stage: Stage, seed: int, out: Connection) -> None:
    memory_growth()  # what the parent had does not count
    out.send(failure_of(plan, stage, seed)[0])


def _await(
    plan: Plan, child: multiprocessing.process.BaseProcess, here: Connection
) -> Failure | None:
    started = time.monotonic()
    while not here.poll(0.02):
        used, waited = _processor_seconds(child.pid), time.monotonic() - started
        if used > plan.seconds or waited > plan.seconds * _PATIENCE:
            return Failure("hang", f"over {plan.seconds:g} s", f"{used:.1f} s of the processor")
    try:
        failure: Failure | None = here.recv()
    except EOFError:
        child.join()
        return Failure("crash", f"exit {child.exitcode}", "the process ended")
    return failure


def _processor_seconds(pid: int | None) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _stage(plan: Plan, seed: int) -> Iterator[Stage]:
    """A stage of its own for the shape of `seed`."""
    with tempfile.TemporaryDirectory(prefix="qchain-find-", dir=place_for_files()) as place:
        stage = Stage(Path(place) / "0", plan.shapes[seed % len(plan.shapes)])
        try:
            yield stage
        finally:
            stage.close()


def minimise(plan: Plan, seed: int, mutant: Mutant, failure: Failure, tries: int = 150) -> Mutant:
    """The same find with fewer changes, and with zeroes for whatever does not matter."""
    left = min(tries, 20) if failure.kind == "hang" else tries

    def still(candidate: Mutant) -> bool:
        nonlocal left
        left -= 1
        found = confirm(plan, seed, candidate)
        return found is not None and (found.kind, found.where) == (failure.kind, failure.where)

    for name, patches in mutant.patches.items():
        for patch in patches:
            kept = [each for each in mutant.patches[name] if each is not patch]
            candidate = replace(mutant, patches=mutant.patches | {name: kept})
            if left > 0 and still(candidate):
                mutant = candidate
    for name, size in mutant.sizes.items():
        pending = [(0, size)]
        while pending and left > 0:
            start, end = pending.pop(0)
            patches = [*mutant.patches.get(name, []), (start, bytes(end - start))]
            candidate = replace(mutant, patches=mutant.patches | {name: patches})
            if still(candidate):
                mutant = candidate
            elif end - start > _GRAIN:
                middle = start + max(_GRAIN, (end - start) // 2 // _GRAIN * _GRAIN)
                pending += [(start, middle), (middle, end)]
    return mutant


def save(plan: Plan, seed: int, mutant: Mutant, failure: Failure, directory: Path) -> Path:
    """Write the find as hex text; returns its name."""
    with _stage(plan, seed) as stage:
        stage.drafts.apply(mutant)
        shape = stage.drafts.shape
        # The active image first: that is how a reader of the text knows it.
        names = sorted(shape.files, key=lambda name: name != shape.active)
        files = {name: bytes(stage.drafts.files[name]) for name in names}
    notes = [
        f"{failure.kind}: {failure.where}",
        f"seed {seed}, shape {shape.name}",
        mutant.what[:400],
    ]
    directory.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{failure.kind}-{failure.where}").strip("-")
    path = directory / f"{name}-{seed}.hex"
    path.write_text(to_hex(files, notes))
    path.with_suffix(".txt").write_text(failure.detail)
    return path
