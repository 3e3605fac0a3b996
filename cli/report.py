"""`qchain report`: a chain as one HTML page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qchain.errors import printable

from .options import Common, command
from .output import absolute, shell_word, write, write_json

__all__ = ["report"]


@command
def report(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The active image.")],
    common: Common,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The new HTML file.")
    ],
    no_digests: Annotated[
        bool, typer.Option("--no-digests", help="Leave the digests out: they read everything.")
    ] = False,
) -> None:
    """Write a report in one HTML file: pictures, problems, digests."""
    from qchain.forensics.newfile import new_file, write_all
    from qchain.forensics.page import page
    from qchain.forensics.report import collect

    from .merge import ending_in_order
    from .opening import missing_field, missing_lines, open_for
    from .tables import count_text

    # The new file first: hours of digesting must not end in a name that is taken.
    with (
        ending_in_order(),
        open_for(image, common) as opened,
        new_file(output, 0o644) as stream,
        common.reporter() as reporter,
    ):
        reporter.step("reading", opened.size)
        words = " ".join(shell_word(word) for word in ("qchain", *sys.argv[1:]))
        found = collect(opened, words, not no_digests, reporter.advance)
        write_all(stream, page(found).encode("ascii"))
    problems = sum(len(layer.problems) for layer in found.layers)
    if common.json:
        write_json(
            {
                "output": absolute(output),
                "layers": len(found.layers),
                "problems": problems,
                "warnings": found.warnings,
                "digest": found.digest,
            }
            | missing_field(opened)
        )
    else:
        images = count_text(len(found.layers), "image")
        line = f"report on {images} in {printable(output)}"
        write("\n".join([line, *missing_lines(opened), ""]))
