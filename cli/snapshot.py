"""`qchain snapshot`: a new overlay over the live image, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qchain.errors import printable

from .options import Common, command
from .output import absolute, write, write_json

__all__ = ["snapshot"]


@command
def snapshot(
    active: Annotated[Path, typer.Argument(metavar="ACTIVE", help="The live image.")],
    common: Common,
    name: Annotated[
        str,
        typer.Option(
            "--name", metavar="NEW", help="The new overlay (a name beside it, or a path)."
        ),
    ],
    keep_active_name: Annotated[
        bool,
        typer.Option(
            "--keep-active-name",
            help="The overlay takes the live name, the present image becomes NEW.",
        ),
    ] = False,
) -> None:
    """Take an external snapshot: what the image holds stays, the guest writes to a new overlay."""
    from qchain.run.snapshot import take_snapshot

    from .merge import ending_in_order
    from .opening import open_for

    new = Path(name) if "/" in name else active.parent / name
    with open_for(active, common) as chain, ending_in_order():
        live = take_snapshot(chain, new, keep_active_name=keep_active_name)
    below = new if keep_active_name else active
    if common.json:
        write_json({"active": absolute(live), "backing": absolute(below)})
    else:
        new_name, old = printable(live), printable(below)
        write(f"{new_name} is the live image from now on, for the guest to use; {old} keeps\n")
        write("what the guest had, and must not be written to any more.\n")
