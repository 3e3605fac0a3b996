"""Which files changed between two points, where the filesystem can be listed without mounting.

Both points are extracted into sparse temporary files. sfdisk finds the partitions, debugfs
lists the files of ext2, ext3 and ext4. Whether a file's content changed is decided by the
content, never by its times: the guest ranges that differ are laid over the file's extents.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer
from qchain.chain.ownership import ownership
from qchain.errors import WriteFailed
from qchain.forensics.contents import Partition, filesystem_of, partitions_of
from qchain.forensics.ext import ExtTree, Inode, dump_inodes, read_tree
from qchain.forensics.extract import extract_to_file
from qchain.forensics.tools import ToolFailed

__all__ = ["FileChange", "FileReport", "PartitionReport", "changed_files"]


@dataclass(frozen=True, slots=True)
class FileChange:
    """One name that is not the same in both points.

    `change`: 'added' (only in B), 'removed' (only in A), 'type', 'content' or 'metadata';
    `fields`: which metadata differ (of 'mode', 'owner', 'links', 'mtime', 'ctime', 'size').
    A content that changed under an unchanged mtime is a sign of tampering.
    """

    partition: int | None
    path: str
    change: str
    fields: tuple[str, ...] = ()


@dataclass(slots=True)
class PartitionReport:
    """One partition (`number` None: the whole disk), start and length in bytes.

    `changed`: a differing range lies in it. `reason`: why its files are not named.
    """

    number: int | None
    start: int
    length: int
    filesystem: str | None
    changed: bool
    reason: str | None = None


@dataclass(slots=True)
class FileReport:
    """`reason`: why nothing could be said of files; None when anything was listed."""

    reason: str | None = None
    table_changed: bool = False
    partitions: list[PartitionReport] = field(default_factory=list)
    changes: list[FileChange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Ranges:
    """Differing byte ranges, sorted; `complete` is False when there were too many to keep."""

    def __init__(self, ranges: Sequence[tuple[int, int]], complete: bool) -> None:
        self.starts: npt.NDArray[np.int64] = np.array([r[0] for r in ranges], np.int64)
        self.ends: npt.NDArray[np.int64] = self.starts + np.array([r[1] for r in ranges], np.int64)
        self.complete = complete

    def touch(self, start: int, length: int) -> bool:
        first = int(np.searchsorted(self.ends, start, "right"))
        return first < len(self.starts) and int(self.starts[first]) < start + length


def changed_files(
    a: Sequence[Layer],
    b: Sequence[Layer],
    ranges: Sequence[tuple[int, int]],
    complete: bool = True,
) -> FileReport:
    """Name the files that changed from point `a` to point `b` (layers, active first).

    Args:
        ranges: (start, length) of what differs, sorted (`qchain.verify.compare.compare`).
        complete: `ranges` holds all of it.

    The temporary files (TMPDIR) are removed in any case. Why files cannot be named is in
    the result.
    Raises: `ImageError` when an image cannot be read.
    """
    report = FileReport()
    with tempfile.TemporaryDirectory(prefix="qchain-") as name:
        work = Path(name)
        needed = sum(own.owned for layers in (a, b) for own in ownership(layers))
        if shutil.disk_usage(work).free < needed + (64 << 20):
            report.reason = (
                f"{needed} bytes of temporary space are needed and not there (TMPDIR names "
                "another place)"
            )
            return report
        raws = (work / "a", work / "b")
        try:
            for layers, raw in zip((a, b), raws, strict=True):
                extract_to_file(layers, raw)
            _compare_disks(raws, _Ranges(ranges, complete), report)
        except ToolFailed as error:
            report.reason = str(error)
        except WriteFailed as error:
            report.reason = f"temporary files {error.why} (TMPDIR names another place)"
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            report.reason = f"temporary files cannot be used: {why} (TMPDIR names another place)"
    return report


def _compare_disks(raws: tuple[Path, Path], ranges: _Ranges, report: FileReport) -> None:
    tables = [partitions_of(raw) for raw in raws]
    report.table_changed = tables[0] != tables[1]
    whole = [[Partition(None, 0, raw.stat().st_size)] for raw in raws]
    found = [
        table if table is not None else disk for table, disk in zip(tables, whole, strict=True)
    ]
    starts = [{part.start: part for part in table} for table in found]
    for start in sorted({*starts[0], *starts[1]}):
        left, right = starts[0].get(start), starts[1].get(start)
        part = right or left
        assert part is not None
        length = max(each.length for each in (left, right) if each is not None)
        entry = PartitionReport(
            part.number,
            start,
            length,
            filesystem_of(raws[1] if right else raws[0], start),
            ranges.touch(start, length),
        )
        report.partitions.append(entry)
        if left is None or right is None:
            entry.reason = f"it exists only in {'B' if left is None else 'A'}"
        elif entry.changed:
            try:
                _compare_partition(raws, entry, ranges, report)
            except ToolFailed as error:
                entry.reason = str(error)
    unnamed = [each.reason for each in report.partitions if each.changed and each.reason]
    if unnamed and all(each.reason for each in report.partitions if each.changed):
        report.reason = unnamed[0]
    elif not report.partitions:
        report.reason = "the partition table names no partition"


def _compare_partition(
    raws: tuple[Path, Path], entry: PartitionReport, ranges: _Ranges, report: FileReport
) -> None:
    kinds = [filesystem_of(raw, entry.start) for raw in raws]
    if kinds != ["ext", "ext"]:
        kind = next((each for each in kinds if each != "ext"), None)
        what = "no filesystem that is known" if kind is None else kind
        raise ToolFailed(f"it holds {what}; only ext2, ext3 and ext4 can be listed unmounted")
    trees = [read_tree(raw, entry.start) for raw in raws]
    for side, tree in zip("AB", trees, strict=True):
        report.notes += [f"{side}: {note}" for note in dict.fromkeys(tree.notes)]
    content = _Content(raws, (trees[0], trees[1]), entry.start, ranges)
    for path in sorted({*trees[0].paths, *trees[1].paths}):
        number_a, number_b = trees[0].paths.get(path), trees[1].paths.get(path)
        name = os.fsdecode(path)
        if number_a is None or number_b is None:
            change = "added" if number_a is None else "removed"
            report.changes.append(FileChange(entry.number, name, change))
            continue
        one, two = trees[0].inodes.get(number_a), trees[1].inodes.get(number_b)
        if one is None or two is None:
            report.notes.append(f"{name}: its inode cannot be read")
        elif (found := _change(one, two, content)) is not None:
            report.changes.append(FileChange(entry.number, name, *found))


def _change(one: Inode, two: Inode, content: _Content) -> tuple[str, tuple[str, ...]] | None:
    fields = tuple(
        name
        for name, differs in (
            ("mode", one.mode != two.mode),
            ("owner", (one.uid, one.gid) != (two.uid, two.gid)),
            ("links", one.links != two.links),
            ("mtime", one.mtime != two.mtime),
            ("ctime", one.ctime != two.ctime),
            ("size", one.size != two.size),
        )
        if differs
    )
    if one.type != two.type:
        return "type", fields
    # What a directory holds is told by the names below it.
    if one.type != "directory" and content.differs(one, two):
        return "content", fields
    return ("metadata", fields) if fields else None


class _Content:
    """Do two inodes hold the same bytes? Answered from the ranges where they decide."""

    def __init__(
        self, raws: tuple[Path, Path], trees: tuple[ExtTree, ExtTree], start: int, ranges: _Ranges
    ) -> None:
        self._raws, self._start, self._ranges = raws, start, ranges
        self._blocks = (trees[0].block_size, trees[1].block_size)
        self._inline = [
            dump_inodes(raw, start, [each.number for each in tree.inodes.values() if each.inline])
            for raw, tree in zip(raws, trees, strict=True)
        ]

    def differs(self, one: Inode, two: Inode) -> bool:
        if one.size != two.size or one.target != two.target:
            return True
        same_place = one.extents == two.extents and self._blocks[0] == self._blocks[1]
        if same_place and self._ranges.complete and not one.inline and not two.inline:
            touched = [span for span in self._spans(one, 0) if self._ranges.touch(*span[1:])]
            if not touched:
                return False
        return self._digest(one, 0) != self._digest(two, 1)

    def _spans(self, inode: Inode, side: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the file, byte of the disk, length), cut at the file's end."""
        block = self._blocks[side]
        for logical, physical, count in inode.extents:
            length = min(count * block, inode.size - logical * block)
            if length > 0:
                yield logical * block, self._start + physical * block, length

    def _digest(self, inode: Inode, side: int) -> bytes:
        """Of the non-zero sectors with their places: equal exactly if the content is."""
        state = hashlib.sha256()
        if inode.inline:
            _feed(state, 0, self._inline[side].get(inode.number, b"")[: inode.size])
            return state.digest()
        left = self._raws[side].stat().st_size
        with self._raws[side].open("rb") as stream:
            for place, offset, length in self._spans(inode, side):
                left -= length
                if left < 0:
                    raise ToolFailed("a file claims more space than the disk has")
                stream.seek(offset)
                for done in range(0, length, 1 << 20):
                    _feed(state, place + done, stream.read(min(1 << 20, length - done)))
        return state.digest()


def _feed(state: hashlib._Hash, place: int, data: bytes) -> None:
    for low in range(0, len(data), 512):
        sector = data[low : low + 512].rstrip(b"\0")
        if sector:
            state.update(b"%d:%d:" % (place + low, len(sector)) + sector)
