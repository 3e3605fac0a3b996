"""Progress on stderr: a bar with rate and time left on a terminal, or JSON events.

A bar appears only for work that takes longer than two seconds. Nothing here ever
raises: a merge must not fail because nobody watches it any more.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from qchain.errors import printable

from .output import write_error

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Reporter"]

_PATIENCE = 2.0  # seconds of work before a bar is shown
_EVENT_INTERVAL = 0.1  # seconds between two events of a step


class Reporter:
    """Hears how work goes on (`qchain.run.execute.Observer`) and shows it.

    `mode`: "auto" (a bar, if stderr is a terminal), "json" (an event per line on
    stderr) or "none". Amounts in bytes. A context manager: leaving it removes the bar.
    """

    def __init__(self, mode: str = "auto") -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._json = mode == "json"
        self._bar_wanted = mode == "auto" and terminal
        self._label = ""
        self._begun = time.monotonic()
        self._told = 0.0
        self._last = (-1, -1)
        self._total = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def step(self, label: str, total: int, done: int = 0) -> None:
        """A step begins: of `total` expected bytes `done` are (total 0: not known, or short)."""
        self._label = label
        self._last = (-1, -1)
        if not done or total != self._total:
            self._stop()
            self._begun = time.monotonic()
        elif self._bar is not None:
            # It is a step of a whole, whose bar goes on.
            self._show(done, total)
        self._total = total
        self._event(done, total)

    def advance(self, done: int, total: int) -> None:
        """How far the present step is."""
        now = time.monotonic()
        if self._json:
            if now - self._told >= _EVENT_INTERVAL or done >= total:
                self._event(done, total)
        elif self._bar_wanted and now - self._begun >= _PATIENCE:
            self._show(done, total)

    def _event(self, done: int, total: int) -> None:
        if self._json and (done, total) != self._last:
            self._told, self._last = time.monotonic(), (done, total)
            event = {"event": "progress", "step": self._label, "done": done, "total": total}
            write_error(json.dumps(event))

    def _show(self, done: int, total: int) -> None:
        try:
            if self._bar is None:
                self._bar, self._task = _bar(self._label, done, total)
            if self._task is not None:
                label = printable(self._label)
                self._bar.update(self._task, completed=done, total=total, description=label)
        except OSError:
            self._bar_wanted = False

    def _stop(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            try:
                bar.stop()
            except OSError:
                self._bar_wanted = False


def _bar(label: str, done: int, total: int) -> tuple[Progress, TaskID]:
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from .output import console

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %", markup=False),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    )
    task = bar.add_task(printable(label), total=total, completed=done)
    bar.start()
    return bar, task
