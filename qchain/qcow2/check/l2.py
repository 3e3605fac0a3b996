"""L2 entries in bulk: the host clusters they refer to, and what is wrong with them.

Source: the qcow2 specification, "Cluster mapping"; qemu's `check_refcounts_l2` and
`check_oflag_copied`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from qchain.hostfile import HostFile
from qchain.qcow2.check.findings import Collector
from qchain.qcow2.check.overlay import I64
from qchain.qcow2.check.references import Extent, References
from qchain.qcow2.check.tally import WINDOW, Tally, Use
from qchain.qcow2.entries import COMPRESSED, OFFSET_MASK, U8, U64, ZERO, Bools
from qchain.qcow2.header import Header

__all__ = ["NOT_ONE", "ONE", "UNKNOWN", "L2Walk"]

NOT_ONE, ONE, UNKNOWN = 0, 1, 2
"""What is known of a stored refcount, as far as the COPIED flag is concerned."""

_RESERVED = 0x3F000000000001FE
_LOW = np.uint64(0xFFFFFFFF)
_PIECE = 1 << 20
# So many impossible entries, and most of a table: it is something else.
_IMPLAUSIBLE = 8
# No image of qemu's has more than one entry for one cluster of the guest.
_FEW = 100


class L2Walk:
    """Goes through all L2 tables of an image, once per window of host clusters."""

    def __init__(
        self,
        file: HostFile,
        header: Header,
        references: References,
        extent: Extent,
        found: Collector,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.file, self.header, self.extent, self.found = file, header, extent, found
        self.references = references
        self.progress = progress
        self.size, self.bits = header.cluster_size, header.cluster_bits
        self.step = 8 * (2 if header.extended_l2 else 1)
        self.judging = True
        self.touched = np.zeros(extent.clusters // WINDOW + 1, bool)
        order = np.argsort(references.active_l2, kind="stable")
        self._tables = references.active_l2[order]
        self._indexes = references.active_index[order]

    def count_in(self, tally: Tally, single: U8) -> None:
        """Count the references into the window of `tally`.

        What is wrong with the entries themselves is noted on the first call; COPIED flags
        are held against `single`, shape as the window: `ONE`, `NOT_ONE` or `UNKNOWN`.
        """
        if not self.judging and not self.touched[tally.low // WINDOW]:
            return
        refs = self.references
        total = int((refs.l2_ends - refs.l2_starts).sum())
        done = 0
        for start, end, weight in zip(
            refs.l2_starts.tolist(), refs.l2_ends.tolist(), refs.l2_weights.tolist(), strict=True
        ):
            for position, words in self._pieces(start, end):
                self._piece(position, words, weight[0], bool(weight[1]), tally, single)
            done += end - start
            if self.progress is not None:
                self.progress(done, total)
        self.judging = False

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, U64]]:
        """(offset, entry words) of what is not a hole, cut at whole clusters."""
        piece = max(self.size, _PIECE)
        for low, high in self.file.data_ranges(start, end):
            begin = max(start, low // self.step * self.step)
            while begin < high:
                cut = min((begin // piece + 1) * piece, end, -(-high // self.step) * self.step)
                raw = self.file.pread(begin, cut - begin)
                raw = raw.ljust(-(-len(raw) // self.step) * self.step, b"\0")
                if raw:
                    yield begin, np.frombuffer(raw, ">u8").astype(np.uint64)
                begin = cut

    def _piece(
        self, position: int, words: U64, weight: int, active: bool, tally: Tally, single: U8
    ) -> None:
        header = self.header
        entries, bitmaps = words, None
        if header.extended_l2:
            entries, bitmaps = words[0::2], words[1::2]
        every = int(np.bitwise_or.reduce(words))
        if not every:
            return
        places = np.arange(len(entries), dtype=np.int64) * self.step + position
        offsets = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
        compressed = (entries & np.uint64(COMPRESSED)) != 0
        host = (offsets != 0) & ~compressed
        if self.judging:
            self._judge(places, entries, offsets, compressed, bitmaps)
        used = np.flatnonzero(host)
        if header.has_data_file:
            if active:
                copied = entries[used] >> np.uint64(63)
                self._note("copied-missing", copied == 0, places[used])
            return
        # What starts beyond the end of the file is not counted.
        used = used[offsets[used] < self.extent.file_size]
        first = offsets[used] >> self.bits
        last = (offsets[used] + (self.size - 1)) >> self.bits
        self._touch(first)
        tally.add_spans(first, last, weight, Use.DATA)
        if active:
            copied = (entries[used] >> np.uint64(63)) == 1
            self.judge_copied(first, copied, places[used], tally, single)
        if compressed.any():
            self._compressed(entries, compressed, bitmaps, weight, tally)

    def _compressed(
        self,
        entries: U64,
        compressed: Bools,
        bitmaps: U64 | None,
        weight: int,
        tally: Tally,
    ) -> None:
        if bitmaps is not None:
            compressed = compressed & (bitmaps == 0)
        start, length = self._location(entries[compressed])
        outside = start + length - self.extent.file_size >= self.size
        start, length = start[~outside], length[~outside]
        first, last = start >> self.bits, (start + length - 1) >> self.bits
        self._touch(first)
        self._touch(last)
        tally.add_spans(first, last, weight, Use.COMPRESSED)

    def _location(self, entries: U64) -> tuple[I64, I64]:
        """Offsets and lengths in bytes of compressed clusters."""
        x = 62 - (self.bits - 8)
        start = (entries & np.uint64((1 << x) - 1)).astype(np.int64)
        descriptor = (entries & np.uint64(COMPRESSED - 1)).astype(np.int64)
        return start, ((descriptor >> x) + 1) * 512 - (start & 511)

    def _touch(self, clusters: I64) -> None:
        if self.judging and len(self.touched) > 1 and len(clusters):
            self.touched[np.unique(clusters // WINDOW)] = True

    def judge_copied(
        self, clusters: I64, copied: Bools, places: I64, tally: Tally, single: U8
    ) -> None:
        """COPIED is to be set exactly where the stored refcount is one."""
        if tally.low > 0 or tally.high <= self.extent.clusters:
            inside = (clusters >= tally.low) & (clusters < tally.high)
            clusters, copied, places = clusters[inside] - tally.low, copied[inside], places[inside]
        state = single[clusters]
        wrong = (state == ONE) != copied
        if wrong.any():
            wrong &= state != UNKNOWN
            self._note("copied-wrong", wrong & copied, places)
            self._note("copied-missing", wrong & ~copied, places)

    def _judge(
        self,
        places: I64,
        entries: U64,
        offsets: I64,
        compressed: Bools,
        bitmaps: U64 | None,
    ) -> None:
        """Note what is wrong with the entries by themselves."""
        header = self.header
        standard = ~compressed
        copied = (entries >> np.uint64(63)) == 1
        zero = standard & ((entries & np.uint64(ZERO)) != 0)
        outside = standard & (offsets >= self.extent.file_size)
        if compressed.any():
            start, length = self._location(entries)
            # With a bitmap it is not counted at all.
            counted = compressed if bitmaps is None else compressed & (bitmaps == 0)
            outside |= counted & (start + length - self.extent.file_size >= self.size)
        problems = {
            "l2-reserved": standard & ((entries & np.uint64(_RESERVED)) != 0),
            "l2-unaligned": standard & (offsets & (self.size - 1) != 0),
            "compressed-copied": compressed & copied,
        }
        if header.has_data_file:
            problems["compressed-data-file"] = compressed
        else:
            problems["l2-outside"] = outside
        if bitmaps is not None:
            allocated, zeroes = bitmaps & _LOW, bitmaps >> np.uint64(32)
            # In a data file offset 0 is valid, where COPIED is set.
            host = standard & ((offsets != 0) | (copied & header.has_data_file))
            problems["subcluster-conflict"] = host & ((allocated & zeroes) != 0)
            problems["subcluster-without-cluster"] = standard & ~host & (allocated != 0)
            if not header.has_data_file:
                problems["compressed-bitmap"] = compressed & (bitmaps != 0)
        bad = np.logical_or.reduce(list(problems.values()))
        if bad.any():
            whole = ~self._implausible(places, entries, bad)
            problems = {kind: mask & whole for kind, mask in problems.items()}
        if bitmaps is not None:
            problems["zero-flag-extended"] = zero
        elif header.version < 3:
            problems["zero-flag-v2"] = zero
        if not header.has_data_file and self.file.size % self.size:
            problems["l2-cut"] = self._cut(places, entries, offsets, standard, bitmaps)
        for kind, mask in problems.items():
            self._note(kind, mask, places)

    def _cut(
        self, places: I64, entries: U64, offsets: I64, standard: Bools, bitmaps: U64 | None
    ) -> Bools:
        """Entries whose data begins before the end of the file and ends behind it."""
        end, header = self.file.size, self.header
        start = end // self.size * self.size
        out: Bools = standard & (offsets == start)
        if bitmaps is not None:
            # The number of bits tells the last subcluster that is allocated.
            bits = np.frexp((bitmaps & _LOW).astype(np.float64))[1]
            out &= start + bits.astype(np.int64) * (self.size // 32) > end
        elif header.version >= 3:
            out &= (entries & np.uint64(ZERO)) == 0
        if header.size % self.size:
            # Of the disk's last cluster only what the guest sees matters.
            for index in np.flatnonzero(out)[:_FEW].tolist():
                guest = self._guest_of(int(places[index]))
                out[index] = guest is None or start + header.size - guest > end
        return out

    def _implausible(self, places: I64, entries: U64, bad: Bools) -> Bools:
        """Which entries belong to a cluster that holds no L2 entries at all; notes these."""
        table = places // self.size
        table -= table[0]
        wrong = np.bincount(table[bad], minlength=int(table[-1]) + 1)
        used = np.bincount(table[entries != 0], minlength=int(table[-1]) + 1)
        spoilt = (wrong >= _IMPLAUSIBLE) & (wrong * 2 > used)
        for index in np.flatnonzero(spoilt).tolist():
            start = int(places[0]) // self.size * self.size + index * self.size
            detail = f"{wrong[index]} of {used[index]} entries are impossible"
            guest = self._guest_of(start)
            self.found.add(
                "l2-implausible", start, self.size, detail, guest=guest, count=int(wrong[index])
            )
        out: Bools = spoilt[table]
        return out

    def _note(self, kind: str, bad: Bools, places: I64) -> None:
        if not bad.any():
            return
        where = places[bad]
        room = self.found.room(kind)
        for place in where[:room].tolist():
            self.found.add(kind, place, self.step, guest=self._guest_of(place))
        self.found.count_only(kind, len(where[room:]))

    def _guest_of(self, place: int) -> int | None:
        """Guest offset of the cluster that the active entry at `place` maps."""
        index = int(np.searchsorted(self._tables, place, side="right")) - 1
        if index < 0:
            return None
        index = int(np.searchsorted(self._tables, self._tables[index]))
        within = place - int(self._tables[index])
        if within >= self.size:
            return None
        guest = int(self._indexes[index]) * self.header.l2_entries + within // self.step
        guest *= self.size
        return guest if guest < self.header.size else None
