"""`qchain snapshot`: a new overlay over the live image, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qchain.errors import printable

from .options import Common, command
from .output import absolute, note, write, write_json

if TYPE_CHECKING:
    from qchain.chain.chain import Chain

__all__ = ["snapshot"]

_SHOWN = 5  # overlays that are named


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
    """Take an external snapshot: the guest writes to a new overlay."""
    from qchain.run.snapshot import take_snapshot

    from .merge import ending_in_order
    from .opening import open_for

    new = Path(name) if "/" in name else active.parent / name
    with open_for(active, common, reads=False) as chain:
        others = [] if keep_active_name else _overlays(chain)
        with ending_in_order(changing=True):
            live = take_snapshot(chain, new, keep_active_name=keep_active_name)
    if others:
        note(
            f"{active}: {_and(others)} back{'s' * (len(others) == 1)} on it already; "
            f"{new.name} begins another branch"
        )
    below = new if keep_active_name else active
    if common.json:
        write_json({"active": absolute(live), "backing": absolute(below)})
    else:
        new_name, old = printable(live), printable(below)
        write(f"{new_name} is the live image from now on, for the guest to use; {old} keeps\n")
        write("what the guest had, and must not be written to any more.\n")


def _overlays(chain: Chain) -> list[str]:
    """The names of the overlays that the live image has already, in its directory."""
    from qchain.chain.scan import Overlay, overlays_in

    live = chain.active.file.id
    return [
        found.path.name
        for found in overlays_in([chain.active.path.absolute().parent])
        if isinstance(found, Overlay) and found.backing_id == live
    ]


def _and(names: list[str]) -> str:
    """Names for a sentence, the first few of many."""
    if len(names) > _SHOWN:
        names = [*names[:_SHOWN], f"{len(names) - _SHOWN} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
