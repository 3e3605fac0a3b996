"""`qchain domain`: the commands for domains of libvirt."""

from __future__ import annotations

import typer

from .domainbranch import revert, snapshot
from .domainchange import delete_snapshot, flatten
from .domainread import list_, show
from .domainrepair import repair

__all__ = ["app"]

app = typer.Typer(
    help="Snapshots of libvirt's domains: files and records together.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("list")(list_)
app.command("show")(show)
app.command("snapshot")(snapshot)
app.command("delete-snapshot")(delete_snapshot)
app.command("revert")(revert)
app.command("flatten")(flatten)
app.command("repair")(repair)
