"""`qchain seal` and `qchain verify`: digests of a chain, written down and checked later."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qchain.errors import ExitCode, UsageError, printable

from .options import Common, command
from .output import absolute, note, write, write_json

if TYPE_CHECKING:
    from qchain.chain.chain import Chain
    from qchain.forensics.sealcheck import SealCheck

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
    """Write a manifest of digests: of every file and the content."""
    from qchain.forensics.newfile import new_file, write_all
    from qchain.forensics.seal import SEAL_SUFFIX, make_seal, seal_text
    from qchain.forensics.staleness import staleness

    from .merge import ending_in_order
    from .opening import missing_lines, open_for
    from .tables import count_text

    where = output or active.with_name(active.name + SEAL_SUFFIX)
    # The new file first: hours of digesting must not end in a name that is taken.
    with ending_in_order(), open_for(active, common) as opened, new_file(where, 0o644) as stream:
        warnings = staleness(opened.layers)
        with common.reporter() as reporter:
            reporter.step("digesting", opened.size)
            made = make_seal(opened, reporter.advance)
        write_all(stream, seal_text(made))
    if made["unreadable"] is not None:
        warnings.append(f"the files are sealed, what the guest sees is not: {made['unreadable']}")
    for text in warnings:
        note(text)
    if common.json:
        write_json({"output": absolute(where), **made})
    else:
        images = count_text(len(made["layers"]), "image")
        write("\n".join([f"{images} sealed in {printable(where)}", *missing_lines(opened), ""]))


@command
def verify(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The active image.")],
    common: Common,
    seal: Annotated[
        Path | None, typer.Option("--seal", metavar="FILE", help="What 'seal' wrote.")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            metavar="FILE",
            help="What a merge with --verify manifest --keep-files kept.",
        ),
    ] = None,
) -> None:
    """Hold a chain against its seal or manifest (exit 1: changed)."""
    if (seal is None) == (manifest is None):
        raise UsageError("verify", "is held against one file", "add --seal FILE or --manifest FILE")
    if manifest is not None:
        _against_manifest(image, common, manifest)
        return
    assert seal is not None
    from qchain.forensics.seal import read_seal
    from qchain.forensics.sealcheck import check_seal

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
                "layers": [asdict(layer) for layer in found.layers],
                "changes": found.changes,
                "notes": found.notes,
            }
            | missing_field(opened)
        )
    else:
        _show(found, opened)
    if not found.intact:
        raise typer.Exit(ExitCode.NO)


def _against_manifest(image: Path, common: Common, manifest: Path) -> None:
    from qchain.verify.manifest import check_manifest

    from .opening import missing_field, open_for

    with open_for(image, common) as opened, common.reporter() as reporter:
        reporter.step("verifying", opened.size)
        found = check_manifest(manifest, opened.layers, reporter.advance)
        more = missing_field(opened)
    if common.json:
        write_json(
            {
                "intact": found.identical,
                "first_difference": found.first_difference,
                "different_bytes": found.different_bytes,
                "compared_bytes": found.compared_bytes,
            }
            | more
        )
    elif found.identical:
        write(f"intact: {printable(image)} reads as {printable(manifest)} says\n")
    else:
        first, different = found.first_difference, found.different_bytes
        write(f"changed: first at offset {first}, {different} bytes in pieces of 64 KiB\n")
    if not found.identical:
        raise typer.Exit(ExitCode.NO)


def _show(found: SealCheck, opened: Chain) -> None:
    from .opening import missing_lines
    from .tables import fold, write_table

    state = "intact" if found.intact else "changed"
    write(f"{state}, sealed {printable(found.sealed)}\n\n")
    write_table(("image", "state"), [(layer.name, layer.state) for layer in found.layers])
    lines = list(found.changes)
    if not found.intact and found.point_same:
        lines.append("the guest still sees the content that was sealed")
    lines += [f"note: {text}" for text in found.notes]
    lines += missing_lines(opened)
    if lines:
        write("\n" + "".join(fold("", printable(line), "  ") for line in lines))
