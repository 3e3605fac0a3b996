"""`make torture`: merges killed, without power, on full disks, lied to, raced. docs/reliability.md.

Exit code 1 on any loss, with what shows it in build/torture. A run is gone on with by --seed: at
its end it says from which.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

from torture.full import Full
from torture.kills import Tally, Trials
from torture.liars import Liars
from torture.power import Power
from torture.races import Races

SCENARIOS: dict[str, tuple[type[Trials], int]] = {
    "kills": (Trials, 5000),
    "power": (Power, 500),
    "full": (Full, 300),
    "liars": (Liars, 300),
    "races": (Races, 200),
}
"""By option: the scenario, and how many tries there are unless told otherwise."""

_PER_CASE = 10


@dataclass
class Work:
    """What is to be done of one scenario, and what is."""

    name: str
    wanted: int
    next_seed: int
    given: int = 0
    tally: Tally = field(default_factory=Tally)

    def cases(self) -> Iterator[tuple[str, int, int]]:
        """(scenario, seed, tries), one case after the other."""
        while self.given < self.wanted:
            tries = min(_PER_CASE, self.wanted - self.given)
            self.given += tries
            self.next_seed += 1
            yield self.name, self.next_seed - 1, tries


def main() -> int:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    for name, (_, count) in SCENARIOS.items():
        told = f"tries of this kind (default {count}, or 0 if others are given)"
        parser.add_argument(f"--{name}", type=int, metavar="N", help=told)
    parser.add_argument("--seed", type=int, default=1, help="of the first case; then counted up")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="processes (default: one for each processor)")  # fmt: skip
    parser.add_argument("--keep", type=Path, default=Path("build/torture"), metavar="DIR",
                        help="where what shows a loss goes")  # fmt: skip
    chosen = vars(parser.parse_args())
    some = any(chosen[name] is not None for name in SCENARIOS)
    works = [
        Work(name, (0 if some else count) if chosen[name] is None else chosen[name], chosen["seed"])
        for name, (_, count) in SCENARIOS.items()
    ]
    begun = time.monotonic()
    try:
        run(works, chosen["jobs"], chosen["keep"])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    print(summary(works, time.monotonic() - begun), flush=True)
    return int(any(work.tally.losses for work in works))


def run(works: list[Work], jobs: int, keep: Path) -> None:
    """All cases, `jobs` at a time, each in a process of its own."""
    context = get_context("fork")
    waiting = (case for work in works for case in work.cases())
    tallies = {work.name: work.tally for work in works}
    total = sum(work.wanted for work in works)
    begun = told = time.monotonic()
    running = {}
    try:
        while True:
            while len(running) < jobs and (case := next(waiting, None)) is not None:
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_one, args=(*case, keep, there))
                process.start()
                there.close()
                running[here] = (process, case)
            if not running:
                return
            for here in wait(list(running), timeout=1.0):
                process, (name, seed, _) = running.pop(here)  # type: ignore[index]
                try:
                    tally = here.recv()  # type: ignore[union-attr]
                except EOFError:
                    tally = Tally(losses=[f"seed {seed}: the process of the case died"])
                process.join()
                tallies[name].add(tally)
                for loss in tally.losses:
                    print(f"LOSS in {name}, seed {seed}: {loss}", file=sys.stderr, flush=True)
            if time.monotonic() - told > (1 if sys.stderr.isatty() else 30):
                told = time.monotonic()
                done = sum(tally.tries for tally in tallies.values())
                _progress(done, total, told - begun, tallies)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _one(name: str, seed: int, tries: int, keep: Path, there: object) -> None:
    # Whatever ends it: what is mounted and what still runs goes first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="qchain-torture-", dir=place) as scratch:
        tally = SCENARIOS[name][0](seed, Path(scratch), tries, keep).run()
    there.send(tally)  # type: ignore[attr-defined]


def _progress(done: int, total: int, seconds: float, tallies: dict[str, Tally]) -> None:
    rate = done / max(seconds, 1e-9)
    left = (total - done) / max(rate, 1e-9)
    lost = sum(len(tally.losses) for tally in tallies.values())
    line = (
        f"{done:,} of {total:,} tries, {rate:.1f} a second, {left / 60:.0f} minutes left, "
        f"{lost} losses"
    )
    terminal = sys.stderr.isatty()
    start, end = ("\r\x1b[K", "") if terminal else ("", "\n")
    print(f"{start}{line}", end=end, file=sys.stderr, flush=True)


def summary(works: list[Work], seconds: float) -> str:
    """One table, what was hit how often, and from where to go on."""
    lines = [f"{'scenario':10} {'tries':>7} {'losses':>7}   of these"]
    for work in works:
        if not work.wanted:
            continue
        tally = work.tally
        notes = ", ".join(f"{count} {what}" for what, count in sorted(tally.notes.items()) if count)
        lines.append(f"{work.name:10} {tally.tries:7,} {len(tally.losses):7}   {notes}")
    lines += [f"  {work.name}: {loss}" for work in works for loss in work.tally.losses]
    following = max(work.next_seed for work in works)
    lines.append(f"{seconds:.0f} s; the next seed is {following}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
