"""How versions of qemu-img differ in what they read and write: the one place that says so.

7.2 is measured (`tests/test_plan_traced.py`); the others were read in the source of qemu.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT", "Behaviour", "Version", "behaviour_of"]

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What `qemu-img` does from one version on.

    Attributes:
        since: the first version that does so.
        rebase_aligns: rebase reads, compares and writes whole (sub)clusters of the image;
            else it compares sectors of 512 bytes and writes those that differ.
        rebase_reads_again: it reads the old view again from where the new backing ends.
        rebase_compresses: rebase has `-c`.
        measured: seen in its trace, not only read in its source.
    """

    since: Version
    rebase_aligns: bool = False
    rebase_reads_again: bool = False
    rebase_compresses: bool = False
    measured: bool = False


_KNOWN = (
    Behaviour((7, 2, 0), rebase_reads_again=True, measured=True),
    Behaviour((8, 2, 0), rebase_aligns=True, rebase_compresses=True),
)
"""Oldest first. (7.2.0 to 7.2.6 never end where a pull goes beyond the end of the old backing.)"""

DEFAULT = _KNOWN[0]
"""What is assumed where nobody says which qemu-img will do the work."""


def behaviour_of(version: Version | None) -> Behaviour:
    """Of the qemu-img of this version; older ones than known are taken for the oldest."""
    if version is None:
        return DEFAULT
    return next((each for each in reversed(_KNOWN) if each.since <= version), _KNOWN[0])
