"""Where the command begins: so little is loaded here that ^C finds somebody to hear it.

All that `qchain_cli.main` imports takes a fifth of a second. A ^C before this line is Python's.
"""

from __future__ import annotations

import signal
import sys

__all__ = ["start"]


def start() -> int:
    """Load the command line and run it; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Where the caller has them ignored, they stay so (nohup).
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    try:
        from .main import main
    except KeyboardInterrupt:
        sys.stderr.write("qchain: interrupted: nothing was changed\n")
        return 130
    try:
        return main()
    finally:
        # What comes is Python's own end: nothing is left that a signal could put back.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_IGN)


def _interrupt(_number: int, _frame: object) -> None:
    """End as after ^C: what was begun is put back, and what to do is said."""
    raise KeyboardInterrupt
