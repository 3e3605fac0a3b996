"""Time and peak memory of commands, and of library calls in a process of their own.

A ratio is worth something only when both sides ran under the same conditions: `side_by_side`
lets them take turns, and takes medians.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["QCHAIN", "QEMU_IMG", "ROOT", "Runner", "Sample", "command", "library", "side_by_side"]

ROOT = Path(__file__).resolve().parent.parent
QCHAIN = str(Path(sys.executable).with_name("qchain"))
QEMU_IMG = os.environ.get("QCHAIN_QEMU_IMG", "qemu-img")
# Chains of 1000 layers; qemu-img opens every file of them.
_OPEN_FILES = 8192


@dataclass(frozen=True)
class Sample:
    """One run, or the medians of several.

    Seconds on the clock; seconds of all processors together; peak resident bytes. The second
    hardly depends on what else the machine does.
    """

    seconds: float
    cpu: float
    peak: int = 0

    def __add__(self, other: Sample) -> Sample:
        """One after the other."""
        return Sample(
            self.seconds + other.seconds, self.cpu + other.cpu, max(self.peak, other.peak)
        )


Runner = Callable[[], Sample]


def _limits() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _run(argv: Sequence[str], stdout: int) -> tuple[Sample, str]:
    start = time.perf_counter()
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=stdout, cwd=ROOT, text=True, preexec_fn=_limits
    )
    output = process.stdout.read() if process.stdout else ""
    # wait4 tells the peak of this one child.
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.stdout:
        process.stdout.close()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(argv)}")
    cpu = usage.ru_utime + usage.ru_stime
    return Sample(seconds, cpu, usage.ru_maxrss * 1024), output


def command(*argv: str | Path) -> Runner:
    """Run a command, its output to nowhere. RuntimeError when it fails."""
    return lambda: _run([str(part) for part in argv], subprocess.DEVNULL)[0]


def library(task: str, *arguments: str | Path) -> Runner:
    """A task of `benchmarks.worker` in a new process; the seconds are those of the call alone."""
    argv = [sys.executable, "-m", "benchmarks.worker", task, *map(str, arguments)]

    def run() -> Sample:
        sample, output = _run(argv, subprocess.PIPE)
        return Sample(**json.loads(output), peak=sample.peak)

    return run


def side_by_side(runners: dict[str, Runner], repeats: int) -> dict[str, Sample]:
    """Each runner `repeats` times, taking turns: median times, highest peak."""
    found: dict[str, list[Sample]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, runner in runners.items():
            found[name].append(runner())
    return {
        name: Sample(
            statistics.median(sample.seconds for sample in samples),
            statistics.median(sample.cpu for sample in samples),
            max(sample.peak for sample in samples),
        )
        for name, samples in found.items()
    }
