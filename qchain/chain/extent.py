"""`Extent`: the one currency between reader, planner, comparer and tests.

guest   |---- A ----|-- hole --|------ B ------|
depth         0           2            1
extents (0, 64K, depth 0, data) (64K, 32K, depth 2, zero) ...
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Extent"]


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of guest bytes with one state, as `qemu-img map --output=json` describes it.

    Attributes:
        start, length: guest range in bytes.
        depth: the layer that decides what is read; 0 is the active one.
        present: that layer allocates the range (False: no layer does).
        zero: reads as zeroes. data: backed by data in a file.
        compressed: the data is compressed (and has no plain offset).
        offset: host offset in that layer's file, where there is one.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None

    @property
    def end(self) -> int:
        """The first guest byte after the extent."""
        return self.start + self.length

    def as_json(self) -> dict[str, object]:
        """The fields under qemu-img's names; `offset` only where there is one."""
        fields: dict[str, object] = {
            "start": self.start,
            "length": self.length,
            "depth": self.depth,
            "present": self.present,
            "zero": self.zero,
            "data": self.data,
            "compressed": self.compressed,
        }
        if self.offset is not None:
            fields["offset"] = self.offset
        return fields
