"""The rows of a run, as a table of 80 columns and as JSON."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.measure import QEMU_IMG, Sample

__all__ = ["Row", "as_json", "heading", "line"]

_WIDTHS = (32, 9, 9, 7, 7, 6)


@dataclass(frozen=True)
class Row:
    """One measurement, against a peer's or not.

    `goal`: the least peer/ours; negative, the most ours/peer. With `peak` it is not the times
    that count but the peak memory, and the goal is the most bytes. `judged`: the goal is meant
    for images of this size.
    """

    name: str
    ours: Sample | None
    peer: Sample | None = None
    goal: float | None = None
    peak: bool = False
    note: str = ""
    judged: bool = True

    def _ratio(self, value: Callable[[Sample], float]) -> float | None:
        if self.ours is None or self.peer is None:
            return None
        ours, peer = value(self.ours), value(self.peer)
        slower = not self.peak and self.goal is not None and self.goal < 0
        return ours / max(peer, 1e-9) if slower else peer / max(ours, 1e-9)

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer; where the goal is negative, worse."""
        return self._ratio(lambda sample: sample.peak if self.peak else sample.seconds)

    @property
    def cpu_ratio(self) -> float | None:
        """The same in seconds of processors."""
        return None if self.peak else self._ratio(lambda sample: sample.cpu)

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; None where there is none or nothing was measured."""
        value = self.ratio
        if self.peak and self.ours is not None:
            value = self.ours.peak
        if self.goal is None or value is None or not self.judged:
            return None
        at_most = self.peak or self.goal < 0
        return value <= abs(self.goal) if at_most else value >= self.goal


def _amount(sample: Sample | None, peak: bool) -> str:
    if sample is None:
        return "-"
    return f"{sample.peak / (1 << 20):.0f} MiB" if peak else f"{sample.seconds:.3f} s"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}x"


def _goal(row: Row) -> str:
    if row.goal is None or not row.judged:
        return ""
    if row.peak:
        return f"≤{row.goal / (1 << 20):.0f}M"
    return f"≤{-row.goal:g}x" if row.goal < 0 else f"≥{row.goal:g}x"


def _columns(name: str, *others: str) -> str:
    first, *rest = _WIDTHS
    cells = [f"{text:>{width}}" for text, width in zip(others, rest, strict=False)]
    return " ".join([f"{name:<{first}.{first}}", *cells, *others[len(rest) :]])


def heading() -> str:
    head = _columns("what", "qchain", "peer", "ratio", "cpu", "goal", "met")
    return f"{head}\n{'-' * 79}"


def line(row: Row) -> str:
    """One row of the table; its note, if any, on a line of its own."""
    met = {True: "yes", False: "NO", None: ""}[row.met]
    ours, peer = _amount(row.ours, row.peak), _amount(row.peer, row.peak)
    ratios = _times(row.ratio), _times(row.cpu_ratio)
    text = _columns(row.name, ours, peer, *ratios, _goal(row), met).rstrip()
    return f"{text}\n    {row.note:.75}" if row.note else text


def as_json(rows: list[Row], quick: bool) -> dict[str, Any]:
    """The whole run, with what is needed to judge it."""
    version = subprocess.run([QEMU_IMG, "--version"], capture_output=True, text=True, check=False)
    return {
        "quick": quick,
        "machine": {
            "cpus": len(os.sched_getaffinity(0)),
            "load": os.getloadavg(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "qemu_img": version.stdout.partition("\n")[0],
        },
        "rows": [
            asdict(row) | {"ratio": row.ratio, "cpu_ratio": row.cpu_ratio, "met": row.met}
            for row in rows
        ],
    }
