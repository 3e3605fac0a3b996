"""`qchain commit`, `pull`, `copy`: virsh's blockcommit, blockpull and blockcopy, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qchain.errors import printable

from .options import Carrying, Common, Engine, command
from .output import absolute, done_already, write, write_json

if TYPE_CHECKING:
    from qchain.chain.chain_tree import ChainTree
    from qchain.plan.options import MergeOptions
    from qchain.plan.selection import Request

__all__ = ["commit", "copy", "pull"]

Base = Annotated[
    str | None, typer.Option("--base", metavar="NAME", help="The image at the lower end.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@command
def commit(
    active: Annotated[Path, typer.Argument(metavar="ACTIVE", help="The active image.")],
    carrying: Carrying,
    common: Common,
    base: Base = None,
    top: Annotated[
        str | None,
        typer.Option("--top", metavar="NAME", help="The image at the upper end (the active one)."),
    ] = None,
    yes: Yes = False,
) -> None:
    """Commit TOP into BASE (or the lowest), as blockcommit."""
    from qchain.plan.words import commit_request

    from .merge import carry_out
    from .planning import options_of

    options = options_of(carrying)

    def wanted(chain: ChainTree) -> tuple[Request, MergeOptions]:
        request, how = commit_request(chain.layers, base, top, options)
        if not common.json and not carrying.dry_run:
            names = ", ".join(repr(Path(name).name) for name in reversed(request.drop))
            kept = chain.layers[0].path.name if top is None else Path(top).name
            lowest = Path(request.drop[-1]).name
            write(f"The points of {names} vanish; {lowest!r} becomes what {kept!r} is.\n")
            write(f"The name {kept!r} goes: what uses it is to use {lowest!r}.\n\n")
        return request, how

    carry_out("commit", [active], carrying, common, yes, wanted)


@command
def pull(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image that is pulled into.")],
    carrying: Carrying,
    common: Common,
    base: Base = None,
    yes: Yes = False,
) -> None:
    """Pull into IMAGE what is above BASE (or all), as blockpull."""
    from qchain.plan.words import pull_request

    from .merge import carry_out
    from .planning import options_of

    options = options_of(carrying)

    def wanted(chain: ChainTree) -> tuple[Request, MergeOptions]:
        if len(chain.layers) == 1 and not common.json and not carrying.dry_run:
            write(f"{printable(image)} has no backing file: there is nothing below it.\n")
        return pull_request(chain.layers, base, options)

    carry_out("pull", [image], carrying, common, yes, wanted)


@command
def copy(
    active: Annotated[Path, typer.Argument(metavar="ACTIVE", help="The image to be copied.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="The new file.")],
    common: Common,
    base: Base = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands, shell-quoted, in order.")
    ] = False,
    engine: Engine = "auto",
) -> None:
    """Copy ACTIVE's content to a new file (over BASE), as blockcopy."""
    import shlex

    from qchain.plan.options import MergeOptions
    from qchain.plan.selection import find_layer
    from qchain.run.copy import copy_point, planned_copy

    from .merge import ending_in_order
    from .opening import open_for
    from .planning import program
    from .tables import size_text

    with open_for(active, common, reads=dry_run) as chain:
        wanted = planned_copy(
            chain,
            destination,
            None if base is None else find_layer(base, chain.layers),
            MergeOptions(engine=engine).engines[0],
        )
        if dry_run and wanted.native:
            write(f"# qchain itself: copy {printable(active)} to {printable(destination)}\n")
        if dry_run:
            for argv in wanted.commands():
                write(shlex.join([program(), *argv]) + "\n")
            return
        with ending_in_order(), common.reporter() as reporter:
            found = copy_point(wanted, None, reporter)
    with done_already("the copy is made"):
        if common.json:
            verified = {"compared_bytes": found.compared_bytes, "identical": found.identical}
            write_json(
                {
                    "copy": absolute(destination),
                    "backing": wanted.backing,
                    "commands": [[program(), *argv] for argv in wanted.commands()],
                    "verified": verified,
                }
            )
            return
        over = "" if wanted.backing is None else f", over {printable(wanted.backing)}"
        write(f"{printable(destination)} reads as {printable(active)} does{over}.\n")
        compared = size_text(found.compared_bytes)
        write(f"Verified: {compared} compared, all identical. No point vanishes.\n")
