"""`qchain seal` and `qchain verify`: digests of a chain, written down and checked later."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qchain.errors import ExitCode, printable

from .options import Common, command
from .output import absolute, note, write, write_json

__all__ = ["seal", "verify"]


@command
def seal(
    active: Annotated[Path, typer.Argument(metavar="ACTIVE", help="The active image.")],
    common: Common,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The new manifest (ACTIVE.seal.json)."),
    ] = None,
) -> None:
    """Write a manifest of digests: every file of the chain, and what the guest sees."""
    from qchain.forensics.seal import make_seal, write_seal
    from qchain.forensics.staleness import staleness

    from .opening import open_for

    where = output or active.with_name(active.name + ".seal.json")
    with open_for(active, common) as opened:
        warnings = staleness(opened.layers)
        with common.reporter() as reporter:
            reporter.step("digesting", opened.size)
            made = make_seal(opened, reporter.advance)
    write_seal(made, where)
    for text in warnings:
        note(text)
    if common.json:
        write_json({"output": absolute(where), **made})
    else:
        count = len(made["layers"])
        images = "1 image" if count == 1 else f"{count} images"
        write(f"{images} sealed in {printable(where)}\n")


@command
def verify(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The active image.")],
    common: Common,
    seal: Annotated[Path, typer.Option("--seal", metavar="FILE", help="What 'seal' wrote.")],
) -> None:
    """Hold a chain against its seal (exit 0: intact, 1: changed)."""
    from qchain.forensics.seal import check_seal, read_seal

    from .opening import missing_field, open_for

    sealed = read_seal(seal)
    with open_for(image, common) as opened, common.reporter() as reporter:
        reporter.step("verifying", opened.size)
        found = check_seal(opened, sealed, reporter.advance)
    if common.json:
        write_json(
            {
                "intact": found.intact,
                "point_same": found.point_same,
                "sealed": found.sealed,
                "changes": found.changes,
                "notes": found.notes,
            }
            | missing_field(opened)
        )
    else:
        state = "intact" if found.intact else "changed"
        lines = [f"{state}, sealed {found.sealed}", *found.changes]
        if not found.intact and found.point_same:
            lines.append("the guest still sees the content that was sealed")
        lines += [f"note: {text}" for text in found.notes]
        write("".join(f"{printable(line)}\n" for line in lines))
    if not found.intact:
        raise typer.Exit(ExitCode.NO)
