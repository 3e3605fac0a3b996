"""The rows of a run, as a table of 80 columns and as JSON."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.measure import QEMU_IMG

__all__ = ["Row", "as_json", "heading", "line"]

_WIDTHS = (37, 9, 9, 8, 8)


@dataclass(frozen=True)
class Row:
    """One measurement. `ours` and `peer` in seconds (bytes where `unit` is "bytes").

    `goal`: the least peer/ours; negative, the most ours/peer; for bytes the most bytes.
    """

    name: str
    ours: float | None
    peer: float | None = None
    goal: float | None = None
    unit: str = "seconds"
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times faster than the peer; where the goal is negative, slower."""
        if not self.ours or not self.peer:
            return None
        slower = self.goal is not None and self.goal < 0
        return self.ours / self.peer if slower else self.peer / self.ours

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; None where there is none or nothing was measured."""
        value = self.ours if self.unit == "bytes" else self.ratio
        if self.goal is None or value is None:
            return None
        at_most = self.unit == "bytes" or self.goal < 0
        return value <= abs(self.goal) if at_most else value >= self.goal


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value / (1 << 20):.0f} MiB" if unit == "bytes" else f"{value:.3f} s"


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    if row.unit == "bytes":
        return f"≤{row.goal / (1 << 20):.0f}M"
    return f"≤{-row.goal:g}x" if row.goal < 0 else f"≥{row.goal:g}x"


def _columns(name: str, *others: str) -> str:
    first, *rest = _WIDTHS
    cells = [f"{text:>{width}}" for text, width in zip(others, rest, strict=False)]
    return " ".join([f"{name:<{first}.{first}}", *cells, *others[len(rest) :]])


def heading() -> str:
    head = _columns("what", "qchain", "peer", "ratio", "goal", "met")
    return f"{head}\n{'-' * 79}"


def line(row: Row) -> str:
    """One row of the table; its note, if any, on a line of its own."""
    ratio = "" if row.ratio is None else f"{row.ratio:.1f}x"
    met = {True: "yes", False: "NO", None: ""}[row.met]
    ours, peer = _amount(row.ours, row.unit), _amount(row.peer, row.unit)
    text = _columns(row.name, ours, peer, ratio, _goal(row), met).rstrip()
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
        "rows": [asdict(row) | {"ratio": row.ratio, "met": row.met} for row in rows],
    }
