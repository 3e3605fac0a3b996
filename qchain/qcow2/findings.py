"""What was found wrong with a header: text, and how bad it is."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

__all__ = ["Finding", "Level"]


class Level(Enum):
    """How bad a finding is for reading the image."""

    WARNING = 1
    """Worth knowing (dirty): nothing is wrong with what is read."""
    DAMAGE = 2
    """A problem, yet qemu opens the image read-only, and so do we (marked corrupt)."""
    UNSUPPORTED = 3
    """Perhaps a good image, but it uses something unknown: not read."""
    INVALID = 4
    """Breaks a rule that reading depends on: not read."""


class Finding(NamedTuple):
    """One line of what is wrong, without the file's name."""

    text: str
    level: Level
