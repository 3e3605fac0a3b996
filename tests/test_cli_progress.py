"""The progress bar: on a terminal only, with rate and time left, and gone afterwards."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runner import COMMAND
from qchain_cli import progress

from fixtures.oracle import qemu_img

BAR = re.compile(rb"hashing .*[0-9] %.* .B/s.*[0-9]:[0-9]{2}:[0-9]{2}", re.DOTALL)


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


def test_the_bar_of_a_whole_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the same whole changes the words beside the bar, and nothing else."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    with progress.Reporter() as reporter:
        reporter.step("commit", 800)
        reporter.advance(200, 800)
        bar = reporter._bar
        reporter.step("verify", 800, 400)
        assert reporter._bar is bar
        reporter.step("another", 900)
        assert reporter._bar is None
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"commit .* 25 %", text) and re.search(r"verify .* 50 %", text)


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


def test_the_real_command_on_a_real_terminal(tmp_path: Path) -> None:
    """What takes longer than two seconds has a bar with rate and time left: here one long hole."""
    path = tmp_path / "empty.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1T")
    ours, theirs = pty.openpty()
    child = subprocess.Popen([COMMAND, "hash", path], stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    begun = time.monotonic()
    try:
        while time.monotonic() - begun < 30 and not BAR.search(seen):
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 65536)
        assert BAR.search(seen), seen
        assert time.monotonic() - begun >= progress._PATIENCE
    finally:
        child.kill()
        child.wait()
        os.close(ours)
