"""`qchain commit` and `qchain pull`: virsh's blockcommit and blockpull, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Carrying, Common, command
from .output import write

if TYPE_CHECKING:
    from qchain.chain.chain_tree import ChainTree
    from qchain.plan.options import MergeOptions
    from qchain.plan.selection import Request

__all__ = ["commit", "pull"]

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
    """Commit down, as virsh blockcommit: TOP's content under the name of BASE (the lowest)."""
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
    """Pull up, as virsh blockpull: IMAGE takes in what lies above BASE (without: all below)."""
    from qchain.plan.words import pull_request

    from .merge import carry_out
    from .planning import options_of

    options = options_of(carrying)
    carry_out(
        "pull",
        [image],
        carrying,
        common,
        yes,
        lambda chain: pull_request(chain.layers, base, options),
    )
