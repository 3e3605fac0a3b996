"""The amounts that one target costs."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Traffic"]


@dataclass(slots=True)
class Traffic:
    """What one target costs, in bytes (extents and tables are counts).

    Attributes:
        commit_bytes: data that the commit into the target reads, and writes.
        commit_zero_bytes: zero writes of the commit; they carry no data.
        pull_bytes: what the pull into the target writes as data (zero clusters included:
            rebase turns them into data where the new backing is not zero).
        pull_read_bytes: what it reads for that: the old view and the new one of what lies
            between, as far as their files reach; without a new backing the old view of all
            that the target does not allocate, holes included.
        extents: contiguous runs of both.
        new_clusters: clusters of the target that get data and had none.
        new_tables: L2 tables of the target that come into being, for zero writes too.
        held_bytes: what the target allocates.
        shown_bytes: what of that no layer of the group above it hides.
        copy_bytes: of a copy: data that is copied before it is pulled into.
        unsure_bytes: what would move where it takes the contents to tell.
    """

    commit_bytes: int = 0
    commit_zero_bytes: int = 0
    pull_bytes: int = 0
    pull_read_bytes: int = 0
    extents: int = 0
    new_clusters: int = 0
    new_tables: int = 0
    held_bytes: int = field(default=0, compare=False)
    shown_bytes: int = field(default=0, compare=False)
    copy_bytes: int = field(default=0, compare=False)
    unsure_bytes: int = field(default=0, compare=False)

    def add(self, other: Traffic, times: int = 1) -> None:
        for name in Traffic.__slots__:
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
