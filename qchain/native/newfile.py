"""A group written into a new file: data shared or copied, everything else built.

Nobody knows the file until it is whole, so the order of its writes does not matter; it is
flushed by whoever asked for it, and thrown away if anything fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.errors import Refused
from qchain.native.build import Builder, Progress
from qchain.native.clusters import Clusters
from qchain.native.merged import Group
from qchain.native.mover import Dry, Moved, Target
from qchain.native.newheader import Tables, new_header
from qchain.native.tables import Tables as L2Tables
from qchain.qcow2.header import Header

__all__ = ["Names", "compression_of", "measured_new_file", "write_new_file"]

Names = tuple[str | None, str | None]
"""Name and format of a backing file as a header has them."""

_NARROW = 4


def write_new_file(
    fd: int,
    path: Path,
    members: Sequence[Layer],
    below: Sequence[Layer],
    backing: Names,
    progress: Progress | None = None,
) -> Moved:
    """Fill the empty file open at `fd` with the point of `members` over `below`.

    Args:
        members: the kept image first; the new file has its features.
        below: what the new file backs on, uppermost first; empty: it stands alone.
        backing: its name and format as the header is to have them.
        progress: called with (guest bytes done, guest bytes in all).

    Raises: `Refused` where the header has no room; `OSError`; `ImageError` when a source
        cannot be read.
    """
    target = Target(fd, path)
    where, _ = _filled(target, members, below, progress)
    like = members[0].header
    assert like is not None
    try:
        header = new_header(like, where, *backing)
    except ValueError as error:
        raise Refused(path, str(error), "use shorter names") from None
    target.write(0, header)
    return target.moved


def measured_new_file(members: Sequence[Layer], below: Sequence[Layer]) -> tuple[Moved, int]:
    """What `write_new_file` would do, all data being copied, and the bytes of the file."""
    target = Dry()
    return target.moved, _filled(target, members, below, None)[1]


def _filled(
    target: Target, members: Sequence[Layer], below: Sequence[Layer], progress: Progress | None
) -> tuple[Tables, int]:
    """Everything but the header; where its tables are, and the bytes of the file."""
    kept = members[0]
    assert isinstance(kept, Qcow2Layer) and kept.header is not None
    like = kept.header
    group = Group(
        members, below, kept.size, -1, kept.cluster_size, kept.granularity, like.version >= 3
    )
    clusters = Clusters(target, like.cluster_bits, like.refcount_order, 0)
    clusters.take(1)
    count = -(-kept.size // kept.cluster_size)
    tables = L2Tables(clusters, count, like.l2_entry_size // 8)
    Builder(group, clusters, tables, compression_of(like), progress).run()
    tables.close()
    l1_offset = tables.finish()
    placed = clusters.finish()
    assert placed is not None
    where = Tables(kept.size, l1_offset, tables.size, placed.offset, placed.size)
    return where, clusters.at << like.cluster_bits


def compression_of(header: Header) -> str | None:
    """The type of compressed clusters that can be taken over as they are; None: of none.

    Several share a host cluster, which narrow refcounts cannot count.
    """
    return header.compression if header.refcount_order >= _NARROW else None
