"""The progress bar: on a terminal only, with rate and time left, and gone afterwards."""

from __future__ import annotations

import io
import re
import sys

import pytest
from qchain_cli import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, patience: float) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_PATIENCE", patience)
    with progress.Reporter() as reporter:
        reporter.step("hashing [red]x\x1b[2J", 1 << 30)
        for done in range(0, 1 << 30, 1 << 26):
            reporter.advance(done, 1 << 30)
            reporter.advance(done + 1, 1 << 30)
    return stream.getvalue()


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(monkeypatch, Terminal(), 0.0))
    assert "hashing [red]x\\x1b[2J" in text
    assert re.search(r"\d+ %", text) and "[progress" not in text
    assert re.search(r"B/s|\?", text) and re.search(r"\d:\d\d:\d\d|-:--:--", text)


def test_no_bar_for_short_work_or_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), 60.0) == ""
    assert shown(monkeypatch, io.StringIO(), 0.0) == ""


def test_no_colour_if_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown(monkeypatch, Terminal(), 0.0))


def test_nobody_listens_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Terminal):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    shown(monkeypatch, Broken(), 0.0)
