"""`qchain domain`: the commands for domains of libvirt."""

from __future__ import annotations

import typer

from .domainchange import delete_snapshot
from .domainread import list_, show

__all__ = ["app"]

app = typer.Typer(
    help="Domains of libvirt: their chains and snapshot records, changed together.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("list")(list_)
app.command("show")(show)
app.command("delete-snapshot")(delete_snapshot)
