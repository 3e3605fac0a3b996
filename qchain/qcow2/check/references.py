"""Everything that refers to host clusters, except the L2 entries: found once, kept small.

Source: the qcow2 specification; what is counted, and what is skipped as corrupt, is
that of qemu's `calculate_refcounts`, so that the number of leaks agrees with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from qchain.errors import ImageError
from qchain.hostfile import HostFile
from qchain.qcow2.bitmaps import Bitmap, read_bitmaps
from qchain.qcow2.check.findings import Collector
from qchain.qcow2.check.overlay import I64, overlay
from qchain.qcow2.check.snapshots import snapshot_l1_tables
from qchain.qcow2.check.stored import BLOCK_MASK, StoredRefcounts
from qchain.qcow2.check.tally import Tally, Use
from qchain.qcow2.entries import OFFSET_MASK, U64, Bools
from qchain.qcow2.header import Header

__all__ = ["Extent", "References", "find_references"]

_L1_RESERVED = 0x7F000000000001FF
_BITMAP_RESERVED = 0xFF000000000001FE
_PIECE = 1 << 20
_NONE: I64 = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Extent:
    """The size of the file as qemu counts it: in whole sectors."""

    file_size: int
    cluster_size: int

    @property
    def clusters(self) -> int:
        """Host clusters, the last one perhaps only begun."""
        return -(-self.file_size // self.cluster_size)

    def outside(self, offset: int, length: int) -> bool:
        """Whether a range ends a cluster or more beyond the file: it is not counted then."""
        return offset + length - self.file_size >= self.cluster_size


@dataclass(slots=True)
class References:
    """Clusters that metadata refers to, as spans and ranges of host clusters.

    Attributes:
        ranges: first cluster, last cluster, how often, as what.
        spans: first clusters, last clusters, how often (each shape (n,)), as what.
        l2_starts, l2_ends: disjoint ranges of the file that hold L2 entries, in bytes.
        l2_weights: shape (n, 2): by how many ways each is reached; by how many of the
            active L1 table.
        active_l2: offsets that the active L1 table holds, in its order, where one is.
        active_index: index in the L1 table of each of these; `active_copied`: its flag.
        blocks: host clusters of the refcount blocks that are counted.
    """

    ranges: list[tuple[int, int, int, Use]] = field(default_factory=list)
    spans: list[tuple[I64, I64, I64, Use]] = field(default_factory=list)
    l2_starts: I64 = field(default_factory=_NONE.copy)
    l2_ends: I64 = field(default_factory=_NONE.copy)
    l2_weights: I64 = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    active_l2: I64 = field(default_factory=_NONE.copy)
    active_index: I64 = field(default_factory=_NONE.copy)
    active_copied: I64 = field(default_factory=_NONE.copy)
    blocks: I64 = field(default_factory=_NONE.copy)

    def count_in(self, tally: Tally) -> None:
        """Add all that lies in the window of `tally`."""
        for first, last, weight, use in self.ranges:
            tally.add_range(first, last, weight, use)
        for firsts, lasts, weights, use in self.spans:
            tally.add_spans(firsts, lasts, weights, use)


def find_references(
    file: HostFile, header: Header, stored: StoredRefcounts, extent: Extent, found: Collector
) -> References:
    """All references of an image but those of L2 entries; what is wrong goes to `found`.

    Memory: some bytes per L1 entry that the file holds.
    """
    return _Finder(file, header, stored, extent, found).run()


class _Finder:
    def __init__(
        self,
        file: HostFile,
        header: Header,
        stored: StoredRefcounts,
        extent: Extent,
        found: Collector,
    ) -> None:
        self.file, self.header, self.stored = file, header, stored
        self.extent, self.found = extent, found
        self.size = header.cluster_size
        self.bits = header.cluster_bits
        self.out = References()

    def run(self) -> References:
        header = self.header
        self._range("header", 0, self.size, Use.HEADER)
        tables = [(header.l1_table_offset, header.l1_size * 8)]
        snapshots, table_length = snapshot_l1_tables(self.file, header, self.found)
        tables += snapshots
        if table_length:
            self._range("snapshot table", header.snapshots_offset, table_length, Use.SNAPSHOT_TABLE)
        self._l1_tables(tables)
        self._range(
            "refcount table",
            header.refcount_table_offset,
            header.refcount_table_clusters * self.size,
            Use.REFCOUNT_TABLE,
        )
        if header.luks_header is not None and header.luks_header.length:
            self._range("LUKS header", *header.luks_header, Use.LUKS)
        self._bitmaps()
        self._refcount_blocks()
        return self.out

    def _range(self, what: str, offset: int, length: int, use: Use) -> bool:
        """Count a contiguous structure; False if it lies beyond the file."""
        if self.extent.outside(offset, length):
            self.found.add("outside", offset, length, what)
            return False
        if length:
            first, last = offset >> self.bits, (offset + length - 1) >> self.bits
            self.out.ranges.append((first, last, 1, use))
        return True

    def _ranges(self, what: str, tables: list[tuple[int, int]], use: Use) -> list[bool]:
        """Count many tables, which may overlap or be the same; which of them are inside."""
        inside = [not self.extent.outside(*table) for table in tables]
        spans = []
        for table, good in zip(tables, inside, strict=True):
            if not good:
                self.found.add("outside", *table, what)
            elif table[1]:
                spans.append((table[0] >> self.bits, (sum(table) - 1 >> self.bits) + 1))
        if spans:
            columns = np.array(spans, np.int64)
            ones = np.ones((len(spans), 1), np.int64)
            for low, high, weight in zip(*overlay(columns[:, 0], columns[:, 1], ones), strict=True):
                self.out.ranges.append((int(low), int(high) - 1, int(weight[0]), use))
        return inside

    def _l1_tables(self, tables: list[tuple[int, int]]) -> None:
        """`tables`: offset and length in bytes, the active one first."""
        self._ranges("L1 table", tables, Use.L1)
        # Entries beyond the end of the file read as 0: nothing there.
        clipped = [
            (start, min(start + length, self.file.size), index == 0)
            for index, (start, length) in enumerate(tables)
        ]
        clipped = [each for each in clipped if each[0] < each[1]]
        if not clipped:
            return
        columns = np.array([each[:2] for each in clipped], np.int64)
        weights = np.array([(1, each[2]) for each in clipped], np.int64)
        offsets, ways = np.zeros(0, np.int64), np.zeros((0, 2), np.int64)
        active: list[tuple[I64, I64, I64]] = []
        for low, high, weight in zip(*overlay(columns[:, 0], columns[:, 1], weights), strict=True):
            for start in range(int(low), int(high), _PIECE):
                raw = self.file.pread(start, min(_PIECE, int(high) - start))
                words = np.frombuffer(raw.ljust(-(-len(raw) // 8) * 8, b"\0"), ">u8")
                used = np.flatnonzero(words)
                entries = words[used].astype(np.uint64)
                if not len(entries):
                    continue
                places = used * 8 + start
                here = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
                self._judge_l1(entries, here, places)
                if weight[1]:
                    index = (places - self.header.l1_table_offset) // 8
                    flags = (entries >> np.uint64(63)).astype(np.int64)
                    active.append((here, index, flags))
                offsets = np.concatenate([offsets, here])
                ways = np.concatenate([ways, np.broadcast_to(weight, (len(here), 2))])
                if len(offsets) > _PIECE:
                    offsets, ways = _merged(offsets, ways)
        offsets, ways = _merged(offsets, ways)
        if active:
            columns_of = [np.concatenate(each) for each in zip(*active, strict=True)]
            self.out.active_l2, self.out.active_index, self.out.active_copied = columns_of
        self._l2_tables(offsets, ways)

    def _judge_l1(
        self,
        entries: U64,
        offsets: I64,
        places: I64,
    ) -> None:
        self._note("l1-reserved", (entries & np.uint64(_L1_RESERVED)) != 0, places)
        self._note("l1-no-table", offsets == 0, places)
        self._note("l1-unaligned", offsets % self.size != 0, places)
        self._note("l1-outside", offsets + self.size - self.extent.file_size >= self.size, places)

    def _note(self, kind: str, bad: Bools, places: I64) -> None:
        if not bad.any():
            return
        where = places[bad]
        room = self.found.room(kind)
        for place in where[:room].tolist():
            self.found.add(kind, place, 8)
        self.found.count_only(kind, len(where[room:]))

    def _l2_tables(self, offsets: I64, ways: I64) -> None:
        """Count the tables, and keep where there are entries to be looked at."""
        inside = offsets + self.size - self.extent.file_size < self.size
        good = offsets[inside]
        self._spans(good, ways[inside, 0], Use.L2)
        ends = np.minimum(offsets + self.size, self.file.size)
        real = offsets < ends
        self.out.l2_starts, self.out.l2_ends, self.out.l2_weights = overlay(
            offsets[real], ends[real], ways[real]
        )

    def _spans(self, offsets: I64, weights: I64, use: Use) -> None:
        """Count clusters by the offsets that refer to them; unaligned ones touch two."""
        if len(offsets):
            first, last = offsets >> self.bits, (offsets + self.size - 1) >> self.bits
            self.out.spans.append((first, last, weights, use))

    def _bitmaps(self) -> None:
        where = self.header.bitmaps_extension
        if where is None:
            return
        self._range(
            "bitmap directory", where.directory_offset, where.directory_size, Use.BITMAP_DIRECTORY
        )
        try:
            bitmaps = read_bitmaps(self.file, self.header)
        except ImageError as error:
            self.found.add(
                "bitmap-directory", where.directory_offset, where.directory_size, error.why
            )
            return
        for why in _odd_bitmaps(bitmaps, self.header):
            self.found.add("bitmap-directory", where.directory_offset, where.directory_size, why)
        tables = [(each.table_offset, each.table_size * 8) for each in bitmaps]
        self._ranges("bitmap table", tables, Use.BITMAP_TABLE)
        spans = [(start, min(start + length, self.file.size)) for start, length in tables]
        spans = [each for each in spans if each[0] < each[1]]
        if not spans:
            return
        columns = np.array(spans, np.int64)
        ones = np.ones((len(spans), 1), np.int64)
        for low, high, weight in zip(*overlay(columns[:, 0], columns[:, 1], ones), strict=True):
            for start in range(int(low), int(high), _PIECE):
                self._bitmap_table(start, min(_PIECE, int(high) - start), int(weight[0]))

    def _bitmap_table(self, start: int, length: int, weight: int) -> None:
        raw = self.file.pread(start, length)
        words = np.frombuffer(raw.ljust(-(-len(raw) // 8) * 8, b"\0"), ">u8").astype(np.uint64)
        offsets = (words & np.uint64(OFFSET_MASK)).astype(np.int64)
        bad = (words & np.uint64(_BITMAP_RESERVED)) != 0
        bad |= (offsets % self.size != 0) | ((offsets != 0) & ((words & np.uint64(1)) != 0))
        places = np.arange(len(words), dtype=np.int64) * 8 + start
        self._note("bitmap-table-entry", bad, places)
        used = ~bad & (offsets != 0)
        outside = used & (offsets + self.size - self.extent.file_size >= self.size)
        for place, offset in zip(places[outside].tolist(), offsets[outside].tolist(), strict=True):
            self.found.add("outside", place, 8, f"bitmap data at {offset}")
        good = offsets[used & ~outside]
        self._spans(good, np.full(len(good), weight, np.int64), Use.BITMAP_DATA)

    def _refcount_blocks(self) -> None:
        table = self.stored.table
        places = np.arange(len(table), dtype=np.int64) * 8 + self.header.refcount_table_offset
        offsets = table & np.uint64(BLOCK_MASK)
        used = table != 0
        reserved = used & ((table & np.uint64(0x1FF)) != 0)
        unaligned = used & ~reserved & (offsets % np.uint64(self.size) != 0)
        # Compared without a sign: an offset may have all 64 bits.
        beyond = offsets >= np.uint64(self.extent.clusters * self.size)
        beyond &= used & ~reserved & ~unaligned
        self._note("refcount-table-reserved", reserved, places)
        self._note("refcount-block-unaligned", unaligned, places)
        self._note("refcount-block-outside", beyond, places)
        good = offsets[used & ~reserved & ~unaligned & ~beyond].astype(np.int64)
        self._spans(good, np.ones(len(good), np.int64), Use.REFCOUNT_BLOCK)
        self.out.blocks = good >> self.bits


def _odd_bitmaps(bitmaps: list[Bitmap], header: Header) -> Iterator[str]:
    """What qemu's `qcow2_load_dirty_bitmaps` does not take."""
    names: set[str] = set()
    for each in bitmaps:
        # Exactly the bits of the disk, in whole 64-bit words.
        bits = -(-header.size // each.granularity)
        needed = -(-(-(-bits // 64) * 8) // header.cluster_size)
        if not each.in_use and each.table_size != needed:
            yield f"{each.name!r} has a table of {each.table_size} entries, not {needed}"
        if each.name in names:
            yield f"{each.name!r} is the name of two"
        names.add(each.name)


def _merged(offsets: I64, ways: I64) -> tuple[I64, I64]:
    """Equal offsets once, with their weights added up."""
    unique, where = np.unique(offsets, return_inverse=True)
    total = np.zeros((len(unique), 2), np.int64)
    np.add.at(total, where, ways)
    return unique, total
