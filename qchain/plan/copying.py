"""What a copy of a group costs: a new file over the new backing, then in the kept name's place.

convert copies the data that the kept image holds itself (with no new backing all that shows);
what lies between is then pulled in as into the kept image. Zeroes found in data are left out,
so these are upper bounds.
"""

from __future__ import annotations

from qchain.chain.layer import Layer

__all__ = ["new_file_bytes"]


def new_file_bytes(kept: Layer, written: int, extents: int) -> int:
    """The most that a new file like `kept` takes for `written` bytes in `extents` runs."""
    header = kept.header
    if header is None:
        return written
    cluster = header.cluster_size
    whole = -(-kept.size // cluster)
    clusters = min(whole, -(-written // cluster) + 2 * extents)
    span = cluster * header.l2_entries
    tables = min(-(-kept.size // span), clusters)
    l1 = -(-(-(-kept.size // span) * 8) // cluster)
    counted = clusters + tables + l1 + 3
    per_block = cluster * 8 // header.refcount_bits
    blocks = -(-counted // max(1, per_block - 1)) + 1
    return (counted + blocks + -(-blocks * 8 // cluster)) * cluster
