"""`qchain check`: do an image's refcounts agree with its references?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qchain.errors import ExitCode, Unsupported

from .options import Common, command
from .output import absolute, write, write_json

if TYPE_CHECKING:
    from qchain.qcow2.check import CheckReport, Finding

__all__ = ["check"]


@command
def check(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image.")],
    common: Common,
    limit: Annotated[
        int,
        typer.Option("--limit", metavar="N", min=0, help="List at most N problems of one kind."),
    ] = 1000,
) -> None:
    """Check the refcounts of an image (exit 0: consistent, 1: not)."""
    from qchain.chain.chain import named_format
    from qchain.qcow2.check import check_image
    from qchain.qcow2.header import read_header

    from .opening import refuse_writer

    with common.gate().open_named(image) as file:
        if not common.force_share:
            refuse_writer(image, file)
        if named_format(file, common.format) != "qcow2":
            raise Unsupported(image, "a raw image has nothing to check", "name a qcow2 image")
        header = read_header(file)
        with common.reporter() as reporter:
            reporter.step("checking", file.size)
            found = check_image(file, header, reporter.advance, limit)
    if common.json:
        write_json(_as_json(image, found))
    else:
        write(_text(found, limit))
    if not found.clean:
        raise typer.Exit(ExitCode.NO)


def _as_json(image: Path, found: CheckReport) -> dict[str, Any]:
    return {
        "path": absolute(image),
        "corruptions": found.corruptions,
        "leaks": found.leaks,
        "suspicions": found.suspicions,
        "clusters": found.clusters,
        "counts": found.counts,
        "leaked": [{"start": start, "length": length} for start, length in found.leaked],
        "problems": [_problem(each) for each in found.problems],
    }


def _problem(each: Finding) -> dict[str, Any]:
    return {
        "kind": each.kind,
        "severity": each.severity.value,
        "offset": each.offset,
        "length": each.length,
        "guest_offset": each.guest,
        "meaning": each.meaning,
    }


def _text(found: CheckReport, limit: int) -> str:
    from .tables import count_text, facts

    checked = count_text(found.clusters, "host cluster")
    if found.clean:
        return f"consistent ({checked} checked)\n"
    rows = []
    for each in found.problems:
        guest = "" if each.guest is None else f" (guest offset {each.guest})"
        rows.append((f"{each.offset}", f"{each.kind}{guest}: {each.meaning}"))
    counts = ", ".join(
        count_text(count, word)
        for count, word in (
            (found.corruptions, "corruption"),
            (found.leaks, "leaked cluster"),
            (found.suspicions, "suspicion"),
        )
        if count
    )
    text = f"not consistent: {counts} ({checked} checked)\n\n{facts(rows)}"
    listed = Counter(each.kind for each in found.problems)
    if any(count >= limit for count in listed.values()):
        text += f"\nof one kind only the first {limit:,} are listed; --limit shows more\n"
    return text
