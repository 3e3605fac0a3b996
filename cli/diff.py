"""`qchain diff`: what changed between two points, by guest range, layer and file."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qchain.errors import ExitCode, printable

from .options import Point, command
from .output import absolute, note, write, write_json

if TYPE_CHECKING:
    from qchain.chain.chain import Chain
    from qchain.forensics.diff import Difference
    from qchain.forensics.files import FileReport

__all__ = ["diff"]


@command
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="One image, the older one.")],
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
    files: Annotated[
        bool, typer.Option("--files", help="Name the files that changed (ext2, ext3, ext4).")
    ] = False,
) -> None:
    """List the ranges in which A and B differ (exit 0: none, 1: some)."""
    from qchain.forensics.diff import differences
    from qchain.forensics.files import changed_files
    from qchain.verify.compare import MAX_RANGES

    from .opening import missing_field, missing_lines, open_for, tell_cut

    report = None
    gate = common.gate()
    with (
        open_for(a, common, gate) as left,
        open_for(b, replace(common, format=format_b, snapshot=snapshot_b), gate) as right,
        common.reporter() as reporter,
    ):
        reporter.step("comparing", max(left.size, right.size))
        found = list(differences(left.layers, right.layers, reporter.advance))
        ranges = [(each.start, each.length) for each in found]
        complete = len(ranges) < MAX_RANGES
        if files and found:
            reporter.step("naming files", 0)
            report = changed_files(left.layers, right.layers, ranges, complete)
        if common.json:
            missing = missing_field(left) | missing_field(right, "missing_b")
            write_json(_as_json(found, left, right, report) | missing)
        else:
            missing_text = "".join(f"{line}\n" for line in missing_lines(left, right))
            write(_text(found, left, right, report) + missing_text)
    tell_cut(left, right)
    if not complete:
        note(f"{a}: {MAX_RANGES} ranges or more differ; only so many are listed")
    if report is not None and report.reason is not None:
        note(f"{b}: the files cannot be named: {report.reason}")
    if found:
        raise typer.Exit(ExitCode.NO)


def _as_json(
    found: list[Difference], left: Chain, right: Chain, report: FileReport | None
) -> dict[str, Any]:
    def layer(chain: Chain, depth: int | None) -> str | None:
        return None if depth is None else absolute(chain.layers[depth].path)

    out: dict[str, Any] = {
        "identical": not found,
        "ranges": [
            {
                "start": each.start,
                "length": each.length,
                "a_layer": layer(left, each.a),
                "b_layer": layer(right, each.b),
            }
            for each in found
        ],
    }
    if report is not None:
        out["files"] = asdict(report)
    return out


def _text(found: list[Difference], left: Chain, right: Chain, report: FileReport | None) -> str:
    def layer(chain: Chain, depth: int | None) -> str:
        return "(past its end)" if depth is None else printable(chain.layers[depth].path.name)

    from .tables import fold

    if not found:
        return "identical\n"
    lines = [f"{'start':>16} {'length':>16}  layer of A -> layer of B\n"]
    lines += [
        fold(
            f"{each.start:16} {each.length:16}  ",
            f"{layer(left, each.a)} -> {layer(right, each.b)}",
            " " * 35,
        )
        for each in found
    ]
    if report is not None:
        lines += ["\n", *(fold("", line, " " * 10) for line in _file_lines(report))]
    return "".join(lines)


def _file_lines(report: FileReport) -> list[str]:
    from .tables import size_text

    lines = []
    if report.table_changed:
        lines.append("the partition table is not the same")
    for part in report.partitions:
        where = "the disk" if part.number is None else f"partition {part.number}"
        what = f"{where} ({part.filesystem or 'unknown content'}, {size_text(part.length)})"
        if not part.changed and not part.reason:
            lines.append(f"{what}: unchanged")
        elif part.reason:
            lines.append(f"{what}: files not named: {part.reason}")
        else:
            lines.append(f"{what}: changed")
    for change in report.changes:
        place = "" if change.partition is None else f"{change.partition}:"
        fields = ", ".join(change.fields)
        if change.change == "content" and not {"mtime", "ctime"} & set(change.fields):
            fields = f"{fields}, but no time of change" if fields else "and no time of change"
        lines.append(
            f"{change.change:<9} {place}{printable(change.path)}{f'  ({fields})' if fields else ''}"
        )
    return [*lines, *(f"note: {printable(text)}" for text in report.notes)]
