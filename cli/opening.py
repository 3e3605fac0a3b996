"""Open what a command names: through the gate, and not while somebody writes to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qchain.errors import Refused

if TYPE_CHECKING:
    from pathlib import Path

    from qchain.chain.chain import Chain
    from qchain.hostfile import HostFile

    from .options import Common

__all__ = ["open_for", "refuse_writer"]


def refuse_writer(path: Path, file: HostFile) -> None:
    """Raise `Refused` when another process has the image open for writing."""
    from qchain.run.locks import holder_name, probe

    if probe(file.fd).writer:
        who = holder_name(file.fd) or "another process"
        raise Refused(
            path,
            f"in use by {who}, which may write to it",
            "shut the guest off, or read it as it stands with -U",
        )


def open_for(path: Path, common: Common) -> Chain:
    """The chain of `path`, active first.

    Raises: what `qchain.chain.chain.open_chain` raises; `Refused` when an image of the
        chain is in use by a writer and the options do not allow that.
    """
    from qchain.chain.chain import open_chain

    chain = open_chain(path, common.gate(), common.format)
    try:
        if not common.force_share:
            for layer in chain.layers:
                refuse_writer(layer.path, layer.file)
                if layer.data is not layer.file:
                    refuse_writer(layer.data.path, layer.data)
    except BaseException:
        chain.close()
        raise
    return chain
