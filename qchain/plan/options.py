"""What the user may say about how to merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qchain.errors import Refused, UsageError

__all__ = [
    "BITMAPS",
    "ENGINES",
    "NAMES",
    "PREFER",
    "STRATEGIES",
    "VERIFY",
    "MergeOptions",
    "one_of",
]

# What there is. Help and messages name these values, from here.
STRATEGIES = ("auto", "pull", "commit", "both", "copy")
ENGINES = ("auto", "qemu-img")
NAMES = ("kept", "lowest", "target")
PREFER = ("time", "writes", "space")
VERIFY = ("moved", "full", "manifest", "none")
BITMAPS = ("refuse", "carry", "drop")
_LATER = {"--engine": "native"}


def one_of(values: Sequence[str]) -> str:
    """'a, b or c'."""
    return " or ".join([", ".join(values[:-1]), values[-1]])


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The options of plan and merge, checked on creation.

    Raises: `UsageError` for an unknown value, `Refused` for what this version lacks.
    """

    strategy: str = "auto"
    engine: str = "auto"
    names: str = "kept"
    prefer: str = "time"
    verify: str = "moved"
    scan: tuple[Path, ...] = ()
    exact: bool = False
    keep_files: bool = False
    allow_format_change: bool = False
    bitmaps: str = "refuse"

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--strategy", self.strategy, STRATEGIES),
            ("--engine", self.engine, ENGINES),
            ("--names", self.names, NAMES),
            ("--prefer", self.prefer, PREFER),
            ("--verify", self.verify, VERIFY),
            ("--bitmaps", self.bitmaps, BITMAPS),
        ):
            if value in known:
                continue
            if value == _LATER.get(option):
                raise Refused(f"{option} {value}", "not in this version yet", "leave it out")
            raise UsageError(option, f"{value!r} is not possible", f"one of: {', '.join(known)}")
