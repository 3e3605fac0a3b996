"""What the user may say about how to merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qchain.errors import UsageError

__all__ = [
    "AUTO_ENGINES",
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
ENGINES = ("auto", "qemu-img", "native")
NAMES = ("kept", "lowest", "target")
PREFER = ("time", "writes", "space")
VERIFY = ("moved", "full", "manifest", "none")
AUTO_ENGINES = ("qemu-img",)
"""Those of which `--engine auto` takes the cheaper; of a copy by `qchain copy` the first."""
BITMAPS = ("refuse", "carry", "drop")


def one_of(values: Sequence[str]) -> str:
    """'a, b or c'."""
    return " or ".join([", ".join(values[:-1]), values[-1]])


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The options of plan and merge, checked on creation.

    Raises: `UsageError` for an unknown value.
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

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that may do the work."""
        return AUTO_ENGINES if self.engine == "auto" else (self.engine,)

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--strategy", self.strategy, STRATEGIES),
            ("--engine", self.engine, ENGINES),
            ("--names", self.names, NAMES),
            ("--prefer", self.prefer, PREFER),
            ("--verify", self.verify, VERIFY),
            ("--bitmaps", self.bitmaps, BITMAPS),
        ):
            if value not in known:
                choices = f"one of: {', '.join(known)}"
                raise UsageError(option, f"{value!r} is not possible", choices)
