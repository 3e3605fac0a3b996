"""How much a target grows, in clusters of its own and at the end of its file.

How many clusters are in use afterwards follows from the maps. Where the file ends depends on
the order in which qemu allocates, as soon as there are free clusters in it: a request takes its
clusters in one piece, and passes by what is smaller (`alloc_clusters_noref`). A commit has up
to 16 requests in flight, in no order that could be foretold. So two states are followed, one
in which every free cluster is reused and one in which those are passed by that may be; where
they end alike, that is the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.plan.allocator import FileState, Room, room_of
from qchain.plan.bitmaproom import NO_BITMAPS, BitmapRoom
from qchain.plan.clusters import BLOCK, ClusterCount
from qchain.plan.shrink import Shrunk, shrunk

__all__ = ["Growth", "growth_of"]

_COMMIT_REQUEST = 1 << 20
_PULL_REQUEST = 2 << 20
"""The most bytes that one request of qemu-img writes."""
_RAW_OWN = 16
"""Blocks that a filesystem may count to a file besides its content (its extents)."""


@dataclass(frozen=True, slots=True)
class Growth:
    """What a target needs. `clusters`: of its own size (raw: blocks of 4096 bytes).

    Attributes:
        clusters: how many more are in use afterwards (may be negative).
        clusters_least: less than `clusters` where qemu's order decides.
        end: bytes up to which the file has been used afterwards (raw: its length).
        end_least: less than `end` where qemu's order decides.
        file: bytes by which the file grows at most, at any moment (raw: what its holes take).
        written: bytes of the clusters that are written.
        rescued: bytes of the compressed clusters that are copied out beforehand.
        work: bytes of the work files that bitmaps need.
    """

    clusters: int
    clusters_least: int
    end: int
    end_least: int
    file: int
    written: int = 0
    rescued: int = 0
    work: int = 0

    @property
    def exact(self) -> bool:
        """Whether qemu's order decides nothing."""
        return self.clusters == self.clusters_least and self.end == self.end_least


def growth_of(layer: Layer, count: ClusterCount, bitmaps: BitmapRoom = NO_BITMAPS) -> Growth:
    """What a merge adds to the file of `layer`, in which it does what `count` has counted.

    `bitmaps`: what becomes of those in the file.

    Raises: `ImageError` when the refcounts cannot be read.
    """
    if not isinstance(layer, Qcow2Layer):
        return _raw_growth(layer, count)
    header = layer.header
    assert header is not None
    count.add_end()
    cluster = header.cluster_size
    if not _writes(layer, count) and not bitmaps.any:
        end = -(-layer.file.size // cluster) * cluster
        return Growth(0, 0, end, end, 0, count.written * cluster)
    most_at_once = _PULL_REQUEST if count.pulled else _COMMIT_REQUEST
    # Not aligned, it touches one cluster more.
    request = max(1, min(count.longest, most_at_once // cluster + 1))
    room = room_of(layer, request, count, bitmaps.gone)
    shrinks = shrunk(layer, count, bitmaps.gone) if count.new_size < layer.size else None
    states = [_grown(layer, count, room, reuse, request) for reuse in (True, False)]
    peak = max(state.end for state in states)
    if shrinks is not None:
        freed = count.freed + room.freed
        stay, come = count.cut_tables
        added = count.committed + count.tables + stay
        certain = (room.end == room.used and not freed) or not added
        for state in states:
            state.take(stay, 1)
            peak = max(peak, state.end + come)
            _cut(state, room, shrinks, freed, certain or state.reuse)
    for state in states:
        state.take(count.pulled, request)
    least, most = states
    if bitmaps.any:
        before = room.end + len(bitmaps.gone)
        _place(least, bitmaps.final_least, bitmaps.final_least, bitmaps.replaced)
        _place(most, 2 * (bitmaps.final + bitmaps.filled), bitmaps.final, bitmaps.replaced)
        # Those that go are stored anew while others of them go: blocks may come for them.
        most.used += max(0, -(-(before + len(bitmaps.gone)) // most.per_block) - room.blocks)
        peak = max(peak, before + len(bitmaps.gone))
    peak = max(peak, most.end)
    used = room.used + len(bitmaps.gone)
    return Growth(
        most.used - used,
        least.used - used,
        most.end * cluster,
        least.end * cluster,
        max(0, peak * cluster - layer.file.size),
        (count.written + count.tables) * cluster,
        # With their numbers before them (`qchain.verify.frozen.rescue`).
        (count.unpacked + -(-(count.unpacked + 1) * 8 // cluster)) * cluster * (count.unpacked > 0),
        bitmaps.work,
    )


def _place(state: FileState, taken: int, final: int, replaced: int) -> None:
    """Bitmaps come: `taken` clusters at once at most, of which `final` stay; old ones go."""
    state.take(taken, 1)
    state.used -= taken - final + replaced


def _writes(layer: Qcow2Layer, count: ClusterCount) -> bool:
    """Whether clusters come or go: with many candidates none do."""
    if count.new_size != layer.size:
        return True
    return bool(count.committed + count.pulled + count.freed + count.unpacked + count.tables)


def _grown(
    layer: Qcow2Layer, count: ClusterCount, room: Room, reuse: bool, request: int
) -> FileState:
    """The file after the commit (of a mere pull: after nothing but new L2 tables)."""
    header = layer.header
    assert header is not None
    cluster = header.cluster_size
    per_block = cluster * 8 // header.refcount_bits
    state = FileState(cluster, per_block, reuse, room.used, room.end, room.fitting,
                      room.blocks, room.table)  # fmt: skip
    needed = -(-count.new_size // (cluster * header.l2_entries))
    if needed > header.l1_size:
        # The first thing that a commit does: one piece, then the old one becomes free.
        piece = -(-needed * 8 // cluster)
        if piece <= room.largest:
            state.used += piece
            state.fitting = max(0, state.fitting - piece)
        else:
            state.extend(piece, piece)
        old = -(-header.l1_size * 8 // cluster)
        state.used -= old
        state.fitting += max(0, old - (request - 1))
    # Single clusters that come first pass nothing by.
    state.fitting = max(state.fitting, min(count.early, state.end - state.used))
    freed = count.freed + room.freed
    if reuse:
        state.used -= freed
    state.take(count.committed + count.tables, request)
    if not reuse:
        # What a zero write frees may come too late for the others, or in too small pieces.
        state.used -= freed
        if room.missing:
            state.used += room.missing
        state.fitting = state.end - state.used if request == 1 else 0
    return state


def _cut(state: FileState, room: Room, left: Shrunk, freed: int, certain: bool) -> None:
    """The file is made shorter.

    Args:
        freed: what `state` knows to be freed, of that in `left`.
        certain: what was added went to the end, not into what might be emptied.
    """
    state.used -= left.freed - freed
    if not certain:
        state.used += left.emptied
    if state.end > room.end:
        # What went to the end keeps the block that counts it.
        if certain and left.last_emptied and room.end % state.per_block:
            state.used += 1
    elif certain:
        state.end, state.blocks = left.end, left.blocks
    state.fitting = 0


def _raw_growth(layer: Layer, count: ClusterCount) -> Growth:
    """Blocks of a raw file: exact where what SEEK_DATA calls a hole takes no space.

    Preallocated space that was not written to looks like a hole; a file that has space for all
    of its length needs no more.
    """
    space = -(-max(count.new_size, layer.file.size) // BLOCK) - layer.file.disk_size // BLOCK
    committed = min(count.committed, max(0, space) + _RAW_OWN)
    added = committed - count.freed
    beyond = -(-count.new_size // BLOCK) * BLOCK
    for low, high in layer.file.data_ranges(beyond, layer.file.size):
        added -= -(-high // BLOCK) - low // BLOCK
    return Growth(added, added, count.new_size, count.new_size, committed * BLOCK)
