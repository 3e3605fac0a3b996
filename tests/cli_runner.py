"""What the tests of the command line share: run it, in this process or as the real command."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qchain_cli.main import main

__all__ = ["COMMAND", "Result", "command", "on_terminal", "run"]

COMMAND = Path(sys.executable).with_name("qchain")


@dataclass(frozen=True)
class Result:
    """How a run of the command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on stdout; nothing else may be there."""
        return json.loads(self.out)

    def fails(self, code: int) -> str:
        """The one line on stderr, which every failure is; asserts exit code and shape."""
        assert self.code == code, (self.code, self.err)
        assert self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        assert self.err.startswith("qchain: ") and self.err[:-1].isprintable(), self.err
        assert "Traceback" not in self.err and "internal error" not in self.err
        return self.err[:-1]


def run(*arguments: str | Path) -> Result:
    """The command line in this process: quick."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Result(int(code), out.getvalue(), err.getvalue())


def command(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> Result:
    """The installed command as a process of its own, with no terminal."""
    done = subprocess.run(
        [COMMAND, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def on_terminal(*arguments: str | Path, columns: int = 80) -> Result:
    """The installed command with a terminal of that width as stdout; colours are left out."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    pieces: list[bytes] = []

    def collect() -> None:
        with contextlib.suppress(OSError):  # what a terminal says when all have left it
            while piece := os.read(ours, 65536):
                pieces.append(piece)

    reader = threading.Thread(target=collect)
    reader.start()
    try:
        done = subprocess.run(
            [COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            # readline, which pytest loads, sets COLUMNS behind Python's back.
            env=dict(os.environ),
        )
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    text = b"".join(pieces).decode().replace("\r\n", "\n")
    return Result(done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", text), done.stderr)
