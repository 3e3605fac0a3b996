"""What qemu-img wrote to a header, read again: an exit code is no evidence."""

from __future__ import annotations

from pathlib import Path

from qchain.chain.names import resolve_name
from qchain.errors import FailedMidway
from qchain.hostfile import HostFile
from qchain.qcow2.header import read_header

__all__ = ["confirm"]


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
