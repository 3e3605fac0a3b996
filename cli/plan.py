"""`qchain plan`: what a merge would cost in every possible way, and which way is the best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Common, Merging, command
from .output import write_json

__all__ = ["plan"]


@command
def plan(
    active: Annotated[
        list[Path],
        typer.Argument(metavar="ACTIVE...", help="The active image; of linked clones all."),
    ],
    merging: Merging,
    common: Common,
) -> None:
    """Plan a merge and say why; nothing is changed."""
    from .planning import (
        asked,
        opened_and_planned,
        program,
        refuse,
        save_plan,
        show_plan,
        write_commands,
    )

    planned = opened_and_planned(active, merging, common, asked(merging), reads=True)
    with planned as (_, made):
        if merging.output is not None:
            save_plan(made, merging.output)
        if common.json:
            write_json(made.as_json(program()))
        elif merging.dry_run:
            write_commands(made)
        else:
            show_plan(made)
        refuse(made)
