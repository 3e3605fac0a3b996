"""What qemu-img wrote to a header, read again: an exit code is no evidence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qchain.chain.layer import Layer
from qchain.chain.names import resolve_name
from qchain.errors import FailedMidway
from qchain.hostfile import FileId, HostFile
from qchain.qcow2.header import read_header

__all__ = ["confirm", "require_same_size"]


def confirm(
    image: Path, backing: Path | None, fmt: str | None, final: Path | None, switched: bool
) -> None:
    """Require that the header of `image` names `backing`, of format `fmt` (None: nothing).

    Args:
        final: the name from which the header is to be understood, if that is not `image`.
        switched: whether names have changed already; then a missing `image` is no fault.

    Raises: `FailedMidway`.
    """
    if not image.exists() and switched:
        return  # repeated after the rename
    with HostFile(image) as file:
        header = read_header(file)
    name = header.backing_name
    found = None if name is None else resolve_name(name, final or image)
    same = (
        found is None
        if backing is None
        else found is not None and found.exists() and found.samefile(backing)
    )
    if not same:
        raise FailedMidway(
            image, f"its header names {name!r} as backing file after 'rebase -u': wrong"
        )
    if backing is not None and header.backing_format != fmt:
        raise FailedMidway(
            image,
            f"its header records {header.backing_format!r} as format of its backing file after "
            f"'rebase -u', not {fmt!r}",
        )


def require_same_size(layers: Sequence[Layer], kept_id: FileId, goal_id: FileId) -> None:
    """Before the kept image goes: the result is a disk of its size, as both are now.

    Raises: `FailedMidway`.
    """
    held = {layer.file.id: layer for layer in layers}
    kept, goal = held.get(kept_id), held.get(goal_id)
    if kept is None or goal is None or kept.file.id == goal.file.id:
        return
    sizes = [
        # Not fstat: it says 0 of a block device.
        os.lseek(layer.file.fd, 0, os.SEEK_END)
        if layer.format == "raw"
        else read_header(layer.file).size
        for layer in (kept, goal)
    ]
    # A raw disk is as long as its file, which may end within a sector.
    if -(-sizes[0] // 512) != -(-sizes[1] // 512):
        raise FailedMidway(
            kept.path, f"is a disk of {sizes[0]} bytes now, and the result one of {sizes[1]}"
        )
