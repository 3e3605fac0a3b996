"""Run one of Debian's own tools on hostile content: no shell, bounded in every way."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ToolFailed", "run_tool"]

MEMORY = 2 << 30
FILE_SIZE = 256 << 20
SECONDS = 120
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class ToolFailed(Exception):
    """A tool is missing or did not do its work; the text is one sentence that says why."""


def run_tool(
    program: str, arguments: Sequence[str], directory: Path
) -> subprocess.CompletedProcess[bytes]:
    """Run `program` in `directory` with limits on memory, processor time, file size and time.

    The limits are set by prlimit(1), because code between fork and exec is not safe in a
    process with threads. Output is captured; the exit code is for the caller to judge.

    Raises: `ToolFailed` when it is not installed, is killed by a limit or takes too long.
    """
    found = shutil.which(program, path=_PATH)
    limiter = shutil.which("prlimit", path=_PATH)
    if found is None or limiter is None:
        missing = program if found is None else "prlimit"
        raise ToolFailed(f"the program {missing} is not installed")
    limits = [f"--as={MEMORY}", f"--cpu={SECONDS}", f"--fsize={FILE_SIZE}", "--core=0"]
    try:
        done = subprocess.run(
            [limiter, *limits, "--", found, *arguments],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
            env={"PATH": _PATH, "LC_ALL": "C", "HOME": os.devnull},
        )
    except subprocess.TimeoutExpired:
        raise ToolFailed(f"{program} took longer than {SECONDS} s") from None
    except OSError as error:
        raise ToolFailed(f"{program} cannot be run: {error.strerror}") from None
    if done.returncode < 0:
        raise ToolFailed(f"{program} was ended by signal {-done.returncode}")
    return done
