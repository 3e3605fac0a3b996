"""`qchain hash`: the digest of what the guest sees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qchain.errors import printable

from .options import Point, command
from .output import write, write_json

__all__ = ["hash_"]


@command
def hash_(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image.")],
    common: Point,
    algorithm: Annotated[
        str, typer.Option("--algorithm", "-a", metavar="NAME", help="As hashlib names it.")
    ] = "sha256",
) -> None:
    """Digest of the raw content (as 'qemu-img convert -O raw' has it)."""
    from qchain.chain.digest import digest

    from .opening import missing_field, missing_lines, open_for, tell_cut

    with open_for(image, common) as opened:
        with common.reporter() as reporter:
            reporter.step("hashing", opened.size)
            found = digest(opened.layers, algorithm, reporter.advance)
        size = opened.size
        tell_cut(opened)
    if common.json:
        fields = {"algorithm": algorithm, "digest": found, "virtual_size": size}
        write_json(fields | missing_field(opened))
    else:
        # Comments to sha256sum.
        comments = [f"# {line}" for line in missing_lines(opened)]
        write("\n".join([f"{found}  {printable(image)}", *comments, ""]))
