"""Is it so? A header, read again after qemu-img has written it: an exit code is not evidence."""

from __future__ import annotations

from pathlib import Path

from qchain.chain.names import resolve_name
from qchain.errors import FailedMidway
from qchain.hostfile import HostFile
from qchain.qcow2.header import read_header

__all__ = ["confirm"]


def confirm(image: Path, backing: Path | None, fmt: str | None) -> None:
    """Raise `FailedMidway` unless `image` names the file `backing`, and records its format.

    None: it names none.
    """
    with HostFile(image) as file:
        header = read_header(file)
    name = header.backing_name
    found = None if name is None else resolve_name(name, image)
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
