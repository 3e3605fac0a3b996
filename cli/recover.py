"""`qchain recover`: finish a merge that was stopped, or put it back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Common, command
from .output import done_already, write, write_json

__all__ = ["recover"]


@command
def recover(
    common: Common,
    where: Annotated[
        Path, typer.Argument(metavar="[IMAGE|DIR]", help="An image of the chain, or its directory.")
    ] = Path(),
    back: Annotated[
        bool, typer.Option("--back", help="Undo what was not switched yet, instead of finishing.")
    ] = False,
) -> None:
    """Finish merges that were stopped (exit 0: nothing is left to do)."""
    from qchain.errors import printable
    from qchain.run.recover import journals_at, recover

    from .merge import ending_in_order

    with ending_in_order(), common.reporter() as reporter:
        done = recover(journals_at(where), back=back, observer=reporter)
    with done_already("nothing is left to recover"):
        if common.json:
            write_json(
                {"recovered": [{"active": str(one.active), "outcome": one.outcome} for one in done]}
            )
            return
        for one in done:
            write(f"{printable(one.active)}: {one.outcome}\n")
        if not done:
            write("Nothing is unfinished.\n")
