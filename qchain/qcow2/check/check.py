"""The check of one image: references counted, held against the refcounts stored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from qchain.errors import Unsupported
from qchain.hostfile import HostFile
from qchain.qcow2.check.findings import MAX_RANGES, CheckReport, Collector
from qchain.qcow2.check.l2 import NOT_ONE, ONE, UNKNOWN, L2Walk
from qchain.qcow2.check.references import Extent, References, find_references
from qchain.qcow2.check.stored import StoredRefcounts
from qchain.qcow2.check.tally import WINDOW, Tally, Use
from qchain.qcow2.entries import Bools
from qchain.qcow2.findings import Level
from qchain.qcow2.header import Header

__all__ = ["check_image"]

_MAX_CLUSTERS = (1 << 31) - 1
_HIGHEST = (1 << 32) - 1

U32 = npt.NDArray[np.uint32]


def check_image(
    file: HostFile,
    header: Header,
    progress: Callable[[int, int], None] | None = None,
    limit: int = 1000,
) -> CheckReport:
    """Check one image; its backing file and its data file are not looked at.

    Source: the qcow2 specification; qemu's `qcow2_check_refcounts`, `check_oflag_copied`
    and `qcow2_check_read_snapshot_table`.

    Args:
        progress: called with the bytes of L2 tables done and in all.
        limit: findings of one kind that are listed; all are counted.

    Memory: at most about 250 MiB and some bytes per L1 entry, whatever the size of the
    file. Time: in proportion to the tables that the file really holds, for every 2^23
    host clusters.

    Raises:
        ImageError, Unsupported: the header does not allow reading; more than 2^31 - 1
            host clusters, where qemu-img check gives up too.
        DataError: the host file cannot be read.
    """
    header.require_readable(file.path)
    extent = Extent(-(-file.size // 512) * 512, header.cluster_size)
    if extent.clusters > _MAX_CLUSTERS:
        raise Unsupported(file.path, f"{extent.clusters} host clusters are too many to check")
    found = Collector(limit)
    for note in header.findings:
        if note.level is Level.DAMAGE:
            found.add("header", 0, header.header_length, note.text)
    if header.autoclear & 2 and not header.has_data_file:
        # qemu refuses to open it.
        why = "it asks for a raw external data file without having a data file"
        found.add("header", 0, header.header_length, why)
    stored = StoredRefcounts(file, header)
    references = find_references(file, header, stored, extent, found)
    walk = L2Walk(file, header, references, extent, found, progress)
    # One cluster more: a reference may reach over the end of the file.
    total = extent.clusters + 1
    for low in range(0, total, WINDOW):
        _check_window(low, min(low + WINDOW, total), stored, references, walk, found)
    return found.report(extent.clusters)


def _check_window(
    low: int,
    high: int,
    stored: StoredRefcounts,
    references: References,
    walk: L2Walk,
    found: Collector,
) -> None:
    tally = Tally(low, high)
    refcounts, unknown, any_stored = stored.window(low, high)
    single = np.where(refcounts == 1, np.uint8(ONE), np.uint8(NOT_ONE))
    for begin, end in unknown:
        single[begin:end] = UNKNOWN
    references.count_in(tally)
    tables = references.active_l2
    real = (tables != 0) & (tables < walk.extent.file_size)
    walk.judge_copied(
        tables[real] >> walk.bits,
        references.active_copied[real] == 1,
        references.active_index[real] * 8 + walk.header.l1_table_offset,
        tally,
        single,
    )
    walk.count_in(tally, single)
    counts = tally.counts
    if not any_stored and not counts.any():
        return
    size = 1 << walk.bits
    if high > walk.extent.clusters and not counts[-1]:
        # Nothing reaches over the end: the cluster behind it does not count.
        counts, refcounts = counts[:-1], refcounts[:-1]
    blocks = references.blocks
    blocks = blocks[(blocks >= low) & (blocks < high)]
    for block in np.unique(blocks[counts[blocks - low] != 1]).tolist():
        detail = f"{int(counts[block - low])} references"
        found.add("refcount-block-shared", block * size, size, detail)
    over = counts > np.uint64(stored.maximum)
    for begin, end in _runs(over, tally.uses[: len(over)]):
        span = (low + begin) * size, (end - begin) * size
        found.add("refcount-overflow", *span, count=end - begin)
    rebuilt = np.minimum(counts, np.uint64(min(stored.maximum, _HIGHEST))).astype(np.uint32)
    for begin, end in unknown:
        refcounts[begin:end] = rebuilt[begin:end]
    _compare(low, size, refcounts, rebuilt, found)
    shared = tally.overlaps()
    for begin, end in _runs(shared, tally.uses):
        span = (low + begin) * size, (end - begin) * size
        found.add("overlap", *span, Use(int(tally.uses[begin])).words, count=end - begin)


def _compare(low: int, size: int, refcounts: U32, rebuilt: U32, found: Collector) -> None:
    """Stored against rebuilt refcounts of the clusters from `low` on."""
    for kind, wrong in (
        ("leak", refcounts > rebuilt),
        ("refcount-too-low", refcounts < rebuilt),
    ):
        total = int(np.count_nonzero(wrong))
        for begin, end in _runs(wrong, refcounts, rebuilt, most=found.room(kind)):
            detail = f"refcount {refcounts[begin]}, references {rebuilt[begin]}"
            span = (low + begin) * size, (end - begin) * size
            found.add(kind, *span, detail, count=end - begin)
            total -= end - begin
        found.count_only(kind, total)
    for begin, end in _runs((refcounts > 0) & (rebuilt == 0)):
        found.add_leaked((low + begin) * size, (end - begin) * size)


def _runs(
    chosen: Bools, *keys: npt.NDArray[np.unsignedinteger], most: int = MAX_RANGES
) -> list[tuple[int, int]]:
    """(begin, end) of neighbours that are chosen and equal in every key; the first `most`."""
    where = np.flatnonzero(chosen)
    if not len(where):
        return []
    border = np.diff(where) != 1
    for key in keys:
        values = key[where]
        border |= values[1:] != values[:-1]
    breaks = np.flatnonzero(border)
    begins = where[np.concatenate([[0], breaks + 1])][:most]
    ends = where[np.concatenate([breaks, [len(where) - 1]])][:most] + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))
