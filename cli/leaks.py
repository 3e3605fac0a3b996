"""`qchain leaks`: what lies in the clusters of an image that nothing refers to."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qchain.errors import ImageError, UsageError, printable

from .options import Common, command
from .output import absolute, note, write, write_json

if TYPE_CHECKING:
    from qchain.forensics.look import Look
    from qchain.forensics.unused import UnusedRange
    from qchain.hostfile import HostFile

    from .progress import Reporter

__all__ = ["leaks"]


@command
def leaks(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image, qcow2.")],
    common: Common,
    extract: Annotated[
        Path | None,
        typer.Option("--extract", metavar="DIR", help="Copy all that is not zero into DIR."),
    ] = None,
) -> None:
    """List leaked and free clusters and slack, and what is in them."""
    from qchain.chain.chain import named_format
    from qchain.forensics.look import MAX_MAGIC, knows_magic, look_at
    from qchain.forensics.unused import unused_ranges
    from qchain.qcow2.check import check_image
    from qchain.qcow2.header import read_header

    from .merge import ending_in_order
    from .opening import refuse_writer

    with (
        ending_in_order(changing=extract is not None),
        common.gate().open_named(image) as file,
        common.reporter() as reporter,
    ):
        if not common.force_share:
            refuse_writer(image, file)
        if named_format(file, common.format) != "qcow2":
            raise ImageError(image, "a raw image has no clusters", "name a qcow2 image")
        header = read_header(file)
        header.require_readable(image)
        reporter.step("checking", file.size)
        report = check_image(file, header, reporter.advance)
        ranges = unused_ranges(file, header, report.leaked)
        total, done = sum(each.length for each in ranges), 0
        reporter.step("looking", total)
        found = []
        for each in ranges:
            seen = partial(_advance, reporter, done, total)
            found.append((each, look_at(file, each.start, each.length, seen)))
            done += each.length
            reporter.advance(done, total)
        if ranges and not knows_magic():
            note("few kinds of files are known by their magic: pip install 'qchain[forensics]'")
        if any(len(look.magic) >= MAX_MAGIC for _, look in found):
            note(f"{image}: of one range only the first {MAX_MAGIC} beginnings of files are named")
        saved = {} if extract is None else _save(file, found, extract)
    sums = {
        f"{kind}_bytes": sum(each.length for each in ranges if each.kind == kind)
        for kind in ("leaked", "free", "slack")
    }
    if common.json:
        write_json(sums | {"ranges": [_as_json(*pair, saved) for pair in found]})
    else:
        _show(sums, found, saved)


def _advance(reporter: Reporter, before: int, total: int, done: int) -> None:
    reporter.advance(before + done, total)


def _save(
    file: HostFile, found: list[tuple[UnusedRange, Look]], directory: Path
) -> dict[int, Path]:
    """Start of each range to the file that it was copied into."""
    from qchain.forensics.look import save_range

    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UsageError(directory, why, "name a directory") from None
    saved = {}
    for each, look in found:
        if not look.zero:
            path = directory / f"{each.kind}-{each.start:#x}.bin"
            save_range(file, each.start, each.length, path)
            saved[each.start] = path
    return saved


def _as_json(each: UnusedRange, look: Look, saved: dict[int, Path]) -> dict[str, Any]:
    return {
        "kind": each.kind,
        "start": each.start,
        "length": each.length,
        "content": look.summary,
        "nonzero_bytes": look.nonzero,
        "entropy": round(look.entropy, 3),
        "text": round(look.text, 3),
        "magic": [{"offset": offset, "name": name} for offset, name in look.magic],
        "sample": look.sample,
        "file": absolute(saved[each.start]) if each.start in saved else None,
    }


def _show(
    sums: dict[str, int], found: list[tuple[UnusedRange, Look]], saved: dict[int, Path]
) -> None:
    from .tables import fold, size_text, write_table

    words = ", ".join(
        f"{size_text(size)} {name.removesuffix('_bytes')}" for name, size in sums.items()
    )
    write(f"{words}\n")
    if not found:
        return
    rows = [
        (
            each.kind,
            each.start,
            size_text(each.length),
            look.summary,
            f"{look.entropy:.2f}",
            look.sample[:40],
        )
        for each, look in found
    ]
    heads = ("kind", "at>", "length>", "content", "entropy>", "first words")
    write("\n")
    write_table(heads, rows)
    begins = [(offset, name) for _, look in found for offset, name in look.magic]
    if begins:
        write("\nhere a file seems to begin\n")
        write_table(("at>", "of this kind"), begins)
    for path in saved.values():
        write(fold("saved ", printable(path), "      "))
