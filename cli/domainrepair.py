"""`qchain domain repair`: records that merges by hand have made false, made true."""

from __future__ import annotations

from typing import Annotated

import typer

from qchain.errors import ExitCode, printable

from .domainchange import Yes, ask
from .domainread import DEFAULT, Connect, problem_json, said
from .merge import ending_in_order
from .options import Common, command
from .output import done_already, note, write, write_json

__all__ = ["repair"]


@command
def repair(
    domain: Annotated[str, typer.Argument(metavar="DOM", help="Its name or UUID.")],
    common: Common,
    connect: Connect = DEFAULT,
    merged_by: Annotated[
        str,
        typer.Option(
            "--merged-by",
            metavar="HOW",
            help="How images were merged by hand: commit, pull, auto (by their times).",
        ),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be mended, change nothing.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Mend records that are not true (paths, parents, formats); files are never changed."""
    from qchain.domains.connection import Host
    from qchain.domains.inventory import look
    from qchain.domains.repair import plan_repair
    from qchain.domains.work import Tools, carry_out

    with Host(connect) as host:
        found = plan_repair(host, look(host, domain), common.gate(), merged_by)
        document = {
            "domain": found.inventory.name,
            "mends": list(found.mends),
            "left": [problem_json(each) for each in found.left],
            "refusals": list(found.refusals),
        }
        if found.refusals:
            if common.json:
                write_json(document)
            note(found.refusals[0])
            raise typer.Exit(ExitCode.REFUSED)
        if not common.json:
            for line in found.mends:
                write(printable(line) + "\n")
            if not found.mends and not found.left:
                write(printable(f"{found.inventory.name}: the records are true") + "\n")
        if found.mends and not dry_run:
            count = len(found.mends)
            question = f"Mend {count} thing{'s' * (count != 1)}?"
            ask(f"domain {found.inventory.name}", yes, question)
            with ending_in_order(changing=True):
                carry_out(host, found.job, Tools())
    with done_already("it is done"):
        if common.json:
            write_json(document)
        elif found.mends and not dry_run:
            write("done\n")
    for problem in found.left:
        note(f"{found.inventory.name}: cannot be mended: {said(problem)}")
    if found.left:
        raise typer.Exit(ExitCode.NO)
