"""`qchain apply`: do a plan that `-o` has saved, if nothing has changed since."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Carrying, Common, command

if TYPE_CHECKING:
    from qchain.chain.chain_tree import ChainTree
    from qchain.plan.options import MergeOptions
    from qchain.plan.selection import Request

__all__ = ["apply"]


@command
def apply(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="What 'qchain plan -o' has saved.")],
    common: Common,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands, change nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Do a saved plan; refused if any of its files has changed since."""
    from qchain.run.saved import read_saved

    from .merge import carry_out

    saved = read_saved(plan)
    saved.require_possible()

    def wanted(tree: ChainTree) -> tuple[Request, MergeOptions]:
        saved.require_same_files(tree)
        return saved.request, saved.options

    carrying = Carrying(dry_run=dry_run)
    carry_out("apply", saved.actives, carrying, common, yes, wanted, saved.require_same_plan)
