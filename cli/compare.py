"""`qchain compare`: does the guest see the same in two images?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qchain.errors import ExitCode

from .options import Point, command
from .output import note, write, write_json

if TYPE_CHECKING:
    from qchain.verify.compare import Comparison

__all__ = ["compare"]


@command
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="One image.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other one.")],
    common: Point,
    format_b: Annotated[
        str | None,
        typer.Option(
            "--format-b", "-F", metavar="FMT", help="Format of B (--format is that of A)."
        ),
    ] = None,
    snapshot_b: Annotated[
        str | None,
        typer.Option(
            "--snapshot-b",
            metavar="NAME",
            help="This internal snapshot of B (--snapshot is that of A).",
        ),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Also list the ranges that differ, in whole sectors.")
    ] = False,
) -> None:
    """Compare what the guest sees in A and B (exit 0: same, 1: not)."""
    from qchain.verify.compare import MAX_RANGES
    from qchain.verify.compare import compare as compare_points

    from .opening import missing_field, missing_lines, open_for, tell_cut

    gate = common.gate()
    second = replace(common, format=format_b, snapshot=snapshot_b)
    with (
        open_for(a, common, gate) as left,
        open_for(b, second, gate) as right,
        common.reporter() as reporter,
    ):
        reporter.step("comparing", max(left.size, right.size))
        found = compare_points(left.layers, right.layers, progress=reporter.advance)
    if common.json:
        missing = missing_field(left) | missing_field(right, "missing_b")
        write_json(_as_json(found, list_) | missing)
    else:
        write(_text(found, list_) + "".join(f"{line}\n" for line in missing_lines(left, right)))
    tell_cut(left, right)
    if list_ and len(found.ranges) >= MAX_RANGES:
        note(f"{a}: more than {MAX_RANGES} ranges differ; only these are listed")
    if not found.identical:
        raise typer.Exit(ExitCode.NO)


def _as_json(found: Comparison, with_ranges: bool) -> dict[str, Any]:
    out: dict[str, Any] = {
        "identical": found.identical,
        "first_difference": found.first_difference,
        "different_bytes": found.different_bytes,
        "compared_bytes": found.compared_bytes,
        "skipped_bytes": found.skipped_bytes,
    }
    if with_ranges:
        out["ranges"] = [{"start": start, "length": length} for start, length in found.ranges]
    return out


def _text(found: Comparison, with_ranges: bool) -> str:
    from .tables import size_text

    read = size_text(found.compared_bytes)
    skipped = f"{size_text(found.skipped_bytes)} needed no reading"
    if found.identical:
        return f"identical ({read} compared, {skipped})\n"
    out = (
        f"different: {found.different_bytes:,} bytes, the first at {found.first_difference} "
        f"({read} compared, {skipped})\n"
    )
    if with_ranges:
        out += f"{'start':>16} {'length':>16}\n"
        out += "".join(f"{start:16} {length:16}\n" for start, length in found.ranges)
    return out
