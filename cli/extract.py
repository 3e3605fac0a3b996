"""`qchain extract`: the raw content that the guest sees, into a file or a pipe."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from qchain.errors import UsageError

from .options import Point, command
from .output import NotWritten, OutputClosed, absolute, write, write_json

__all__ = ["extract", "parse_size"]

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@command
def extract(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image.")],
    common: Point,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="A new file, or - for stdout.")
    ],
    range_: Annotated[
        str | None,
        typer.Option(
            "--range", metavar="START:LENGTH", help="Only this part; bytes, or with k, M, G, T."
        ),
    ] = None,
) -> None:
    """Write the raw content, or a range of it; sparse where zero."""
    from qchain.forensics.extract import extract_to_file, extract_to_stream

    from .merge import ending_in_order
    from .opening import missing_field, missing_lines, open_for, tell_cut

    start, length = (0, None) if range_ is None else _parse_range(range_)
    if output == "-" and common.json:
        raise UsageError("--json", "the content goes to stdout", "give -o a file")
    with ending_in_order(), open_for(image, common) as opened, common.reporter() as reporter:
        reporter.step("extracting", opened.size if length is None else length)
        if output != "-":
            count = extract_to_file(opened.layers, Path(output), start, length, reporter.advance)
        else:
            stream = _stdout()
            try:
                extract_to_stream(opened.layers, stream, start, length, reporter.advance)
                stream.flush()
            except BrokenPipeError:
                raise OutputClosed from None
            except OSError as error:
                raise NotWritten(error) from None
    tell_cut(opened)
    if output == "-":
        return
    if common.json:
        fields = {"output": absolute(Path(output)), "start": start, "length": count}
        write_json(fields | missing_field(opened))
    else:
        write("\n".join([f"{count} bytes extracted", *missing_lines(opened), ""]))


def _stdout() -> BinaryIO:
    stream = None if sys.stdout is None else getattr(sys.stdout, "buffer", None)
    if stream is None:
        raise OutputClosed
    if os.isatty(stream.fileno()):
        raise UsageError("-o -", "stdout is a terminal", "send it to a file or a pipe")
    found: BinaryIO = stream
    return found


def parse_size(text: str) -> int:
    """Bytes from '512', '64k', '1M', '2G', '1T' (powers of 1024). Raises `UsageError`."""
    found = re.fullmatch(r"([0-9]{1,19})([kmgt]?)", text, re.ASCII | re.IGNORECASE)
    if found is None:
        raise UsageError(text, "is no size", "give bytes, or a number with k, M, G or T")
    return int(found[1]) * _UNITS[found[2].lower()]


def _parse_range(text: str) -> tuple[int, int]:
    start, colon, length = text.partition(":")
    if not colon:
        raise UsageError(text, "is no range", "give --range START:LENGTH, as in 1M:64k")
    return parse_size(start), parse_size(length)
