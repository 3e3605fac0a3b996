"""`qchain recover`: finish a merge that was stopped, or put it back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qchain.errors import UsageError, printable

from .options import Common, command
from .output import done_already, write, write_json

if TYPE_CHECKING:
    from qchain.run.recover import Recovered

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
    give_up_dropped: Annotated[
        bool,
        typer.Option(
            "--give-up-dropped",
            help="With --back: even where dropped points no longer read as before.",
        ),
    ] = False,
) -> None:
    """Finish merges that were stopped (exit 0: nothing is left to do)."""
    from qchain.run.recover import journals_at, recover

    from .domainrecover import domains_at
    from .merge import ending_in_order

    if give_up_dropped and not back:
        raise UsageError("--give-up-dropped", "goes with --back only", "add --back")

    with ending_in_order(changing=True):
        with common.reporter() as reporter:
            # A merge that is part of a change to a domain is finished, or put back, with it.
            domains = domains_at(where, back, reporter)
            left = [] if domains and not where.exists() else journals_at(where)
            done = recover(left, back=back, give_up_dropped=give_up_dropped, observer=reporter)
        with done_already("nothing is left to recover"):
            if common.json:
                fields = {"domains": domains} if domains else {}
                write_json({"recovered": [_json(one) for one in done]} | fields)
            else:
                _show(done, domains)


def _show(done: Sequence[Recovered], domains: Sequence[dict[str, str]]) -> None:
    for each in domains:
        line = f"domain {each['domain']}: {each['words']}: {each['outcome']}"
        write(f"{printable(line)}\n")
    for one in done:
        write(f"{printable(one.active)}: {one.outcome}\n")
        for path in one.altered:
            write(f"{printable(path)}: no longer reads as before the merge\n")
    if not (done or domains):
        write("Nothing is unfinished.\n")


def _json(one: Recovered) -> dict[str, Any]:
    return {
        "active": str(one.active),
        "outcome": one.outcome,
        "altered": [str(path) for path in one.altered],
    }
