"""Where the command begins: so little is loaded here that ^C finds somebody to hear it.

All that `qchain_cli.main` imports takes a fifth of a second. A ^C before this line is Python's.
"""

from __future__ import annotations

import sys

__all__ = ["start"]


def start() -> int:
    """Load the command line and run it; returns the exit code."""
    try:
        from .main import main
    except KeyboardInterrupt:
        sys.stderr.write("qchain: interrupted: nothing was changed\n")
        return 130
    return main()
