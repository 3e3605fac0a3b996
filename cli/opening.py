"""Open what a command names: through the gate, and not while somebody writes to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qchain.errors import Refused, printable

from .options import Point
from .output import absolute, note

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qchain.chain.chain import Chain
    from qchain.chain.chain_tree import ChainTree
    from qchain.chain.gate import Gate
    from qchain.hostfile import HostFile

    from .options import Common

__all__ = [
    "cut_text",
    "missing_field",
    "missing_lines",
    "open_for",
    "open_tree_for",
    "refuse_writer",
    "tell_cut",
    "tell_unfinished",
    "unfinished_field",
]


def refuse_writer(path: Path, file: HostFile, *, reads: bool = True) -> None:
    """Raise `Refused` when another process has the image open for writing.

    `reads`: the command only reads, so that -U is a way.
    """
    from qchain.run.locks import holder_name, probe

    if probe(file.fd).writer:
        who = holder_name(file.fd) or "another process"
        raise Refused(
            path,
            f"in use by {who}, which may write to it",
            "shut the guest off" + reads * ", or read it as it stands with -U",
        )


def open_for(path: Path, common: Common, gate: Gate | None = None, *, reads: bool = True) -> Chain:
    """The chain of `path`, active first; of its internal snapshot, where the options name one.

    A backing file that is missing and taken for zeroes is told on stderr.

    Args:
        gate: what `common.gate()` gave, where that was called before (it may read a pipe).
        reads: as of `refuse_writer`.

    Raises: what `qchain.chain.chain.open_chain` raises; `Refused` when an image of the
        chain is in use by a writer and the options do not allow that.
    """
    from qchain.chain.chain import open_chain

    snapshot = common.snapshot if isinstance(common, Point) else None
    chain = open_chain(path, gate or common.gate(), common.format, snapshot)
    _unused(chain, common, reads)
    if chain.missing is not None:
        note(_missing_text(chain.missing))
    return chain


def open_tree_for(paths: Sequence[Path], common: Common, *, reads: bool = True) -> ChainTree:
    """The chains of several active images, each file once. `reads`: as of `refuse_writer`.

    Raises: what `qchain.chain.chain_tree.open_tree` raises; `Refused` when an image is in
        use by a writer and the options do not allow that.
    """
    from qchain.chain.chain_tree import open_tree

    tree = open_tree(paths, common.gate(), common.format)
    _unused(tree, common, reads)
    return tree


def _unused(opened: Chain | ChainTree, common: Common, reads: bool) -> None:
    """Raise `Refused`, and close all, when a writer has one of the files and may not be ignored."""
    try:
        if not common.force_share:
            for layer in opened.layers:
                refuse_writer(layer.path, layer.file, reads=reads)
                if layer.data is not layer.file:
                    refuse_writer(layer.data.path, layer.data, reads=reads)
    except BaseException:
        opened.close()
        raise


def _missing_text(path: Path) -> str:
    return f"{path}: missing, taken for zeroes (--missing zero)"


def missing_lines(*chains: Chain) -> list[str]:
    """For text on stdout: what is missing and taken for zeroes. stderr alone may get lost."""
    found = (chain.missing for chain in chains if chain.missing is not None)
    return [printable(_missing_text(path)) for path in dict.fromkeys(found)]


def missing_field(chain: Chain, name: str = "missing") -> dict[str, str]:
    """For JSON documents: the backing file that is missing and taken for zeroes, if any."""
    return {} if chain.missing is None else {name: absolute(chain.missing)}


def tell_cut(*chains: Chain) -> None:
    """For people, on stderr: data was read that lies beyond the end of a file."""
    for path in dict.fromkeys(
        layer.data.path for chain in chains for layer in chain.layers if layer.cut
    ):
        note(cut_text(path))


def cut_text(path: Path) -> str:
    """That data lies beyond the end of the file `path`."""
    return (
        f"{path}: data lies beyond the end of the file and reads as zeroes, as in qemu: the file "
        "seems cut short; see 'qchain check'"
    )


def unfinished_field(journals: list[Path]) -> dict[str, list[str]]:
    """For JSON documents: the journals of merges that are not finished, if any."""
    return {"unfinished_merges": [absolute(path) for path in journals]} if journals else {}


def tell_unfinished(journals: list[Path]) -> None:
    """For people, on stderr: what stands here may be in the middle of a merge."""
    for path in journals:
        note(f"{path}: a merge is not finished; 'qchain recover {path.parent}' continues it")
