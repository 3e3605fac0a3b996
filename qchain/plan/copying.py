"""What a copy of a group costs: a new file over the new backing, then in the kept name's place.

convert copies the data that the kept image holds itself (with no new backing all that shows);
what lies between is then pulled in as into the kept image. Zeroes found in data are left out,
so these are upper bounds.
"""

from __future__ import annotations

from pathlib import Path

from qchain.chain.layer import Layer
from qchain.plan.commands import (
    convert_argv,
    creation_options,
    rebase_plain_argv,
    rebase_unsafe_argv,
)
from qchain.plan.names import absolute_name

__all__ = ["copy_argvs", "new_file_bytes"]


def copy_argvs(
    image: Layer, backing: Layer | None, base: Layer | None, out: Path, name: str | None
) -> list[list[str]]:
    """qemu-img's command lines that copy a point into the new file `out`.

    Args:
        image: whose content it is; `backing`: its immediate backing file.
        base: what the copy backs on, its backing file or one deeper; None: it stands alone.
        name: the base as the header of `out` is to have it. It is the last thing written, for
            it may be right only from where `out` will lie.
    """
    source, how = absolute_name(image.path), creation_options(image.header)
    if base is None or backing is None:
        return [convert_argv(source, image.format, out, how)]
    # convert copies what the image itself allocates, whatever -B says (measured).
    over = absolute_name(backing.path)
    argvs = [convert_argv(source, image.format, out, how, over, backing.format)]
    whole = absolute_name(base.path)
    if whole != over:
        argvs.append(rebase_plain_argv(out, image.format, whole, base.format))
    if name != str(whole):
        argvs.append(rebase_unsafe_argv(out, image.format, name, base.format))
    return argvs


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
