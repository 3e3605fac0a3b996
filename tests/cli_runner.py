"""What the tests of the command line share: run it, in this process or as the real command."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qchain_cli.main import main

__all__ = ["COMMAND", "Result", "command", "run"]

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
