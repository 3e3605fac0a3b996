"""What a raw disk or a piece of it holds: a partition table, a filesystem, or neither is known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qchain.forensics.tools import ToolFailed, run_tool

__all__ = ["Partition", "filesystem_of", "partitions_of"]

_HEAD = 0x10100
# Types of an MBR partition that only holds others, in sfdisk's writing.
_EXTENDED = ("5", "f", "85")
# (offset, magic, name), from the documentation of each format.
_MAGICS = (
    (1080, b"\x53\xef", "ext"),
    (0, b"XFSB", "XFS"),
    (0x10040, b"_BHRfS_M", "Btrfs"),
    (3, b"NTFS    ", "NTFS"),
    (3, b"EXFAT   ", "exFAT"),
    (54, b"FAT", "FAT"),
    (82, b"FAT32", "FAT"),
    (512, b"LABELONE", "an LVM volume"),
    (0, b"LUKS\xba\xbe", "LUKS encryption"),
    (4096, b"\xfc\x4e\x2b\xa9", "a RAID member"),
    (0, b"hsqs", "SquashFS"),
    (32769, b"CD001", "ISO 9660"),
    (1024, b"\x10\x20\xf5\xf2", "F2FS"),
    (4086, b"SWAPSPACE2", "swap space"),
)


@dataclass(frozen=True, slots=True)
class Partition:
    """`start` and `length` in bytes of the disk; `number` is None for an unpartitioned one."""

    number: int | None
    start: int
    length: int


def partitions_of(raw: Path) -> list[Partition] | None:
    """The partitions in `raw` as sfdisk reads them, in order of the table; None: no table.

    Raises: `ToolFailed` when sfdisk cannot be run or what it says makes no sense.
    """
    done = run_tool("sfdisk", ["--json", "--", raw.name], raw.parent)
    if done.returncode:
        if b"does not contain a recognized partition table" in done.stderr:
            return None
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ToolFailed(f"sfdisk: {reason[-1] if reason else f'exit {done.returncode}'}")
    size = raw.stat().st_size
    try:
        table = json.loads(done.stdout)["partitiontable"]
        unit = int(table.get("sectorsize", 512))
        found = []
        for entry in table.get("partitions", []):
            if table.get("label") == "dos" and entry.get("type") in _EXTENDED:
                continue
            # The device node ends in the number; the file's own name is known.
            number = int(str(entry["node"]).removeprefix(raw.name).lstrip("p"))
            start, length = int(entry["start"]) * unit, int(entry["size"]) * unit
            if 0 <= start < size and length > 0:
                found.append(Partition(number, start, min(length, size - start)))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ToolFailed("sfdisk printed something that is no partition table") from None
    return found


def filesystem_of(raw: Path, start: int) -> str | None:
    """What begins at byte `start`, by its magic: 'ext', another name, or None."""
    with raw.open("rb") as stream:
        stream.seek(start)
        head = stream.read(_HEAD)
    for offset, magic, name in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    return None
