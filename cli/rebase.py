"""`qchain rebase`: lead an image to another backing file; it reads as before, that is proven."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qchain.errors import ExitCode, Refused, UsageError, printable

from .options import Carrying, Common, command
from .output import absolute, done_already, note, write, write_json

if TYPE_CHECKING:
    from qchain.chain.layer import Layer
    from qchain.plan.rebase import Rebase
    from qchain.run.execute import MergeResult

__all__ = ["rebase"]


@command
def rebase(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image that is re-pointed.")],
    common: Common,
    onto: Annotated[Path, typer.Option("--onto", metavar="OTHER", help="What it is to back on.")],
    onto_format: Annotated[
        str | None,
        typer.Option("--onto-format", metavar="FMT", help="Format of OTHER: qcow2 or raw."),
    ] = None,
    allow_copy: Annotated[
        bool, typer.Option("--allow-copy", help="Pull what differs into IMAGE first.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands, change nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Let IMAGE back on OTHER, if it reads as before (exit 1: not)."""
    from qchain.chain.chain import FormatNotRecorded
    from qchain.chain.chain_tree import open_pair
    from qchain.plan.rebase import plan_rebase
    from qchain.run.execute import execute

    from .merge import ending_in_order
    from .opening import refuse_writer
    from .planning import program, refuse, write_commands

    Carrying().refuse(common)
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if not (yes or terminal or dry_run):
        raise UsageError("rebase", "there is no terminal to ask on", "add --yes to do it unasked")
    try:
        tree, other = open_pair(image, onto, common.gate(), common.format, onto_format)
    except FormatNotRecorded as error:
        raise Refused(error.what, error.why, error.todo) from None
    with tree:
        for layer in tree.layers:
            if not common.force_share:
                refuse_writer(layer.path, layer.file, reads=dry_run)
        with common.reporter() as reporter:
            reporter.step("comparing", tree.layers[0].size)
            made = plan_rebase(tree, other, allow_copy=allow_copy, progress=reporter.advance)
        document = _document(made, tree.layers[0], tree.layers[other], program())
        does = bool(made.plan.steps)
        if common.json and (dry_run or not does):
            write_json(document)
        elif dry_run:
            write_commands(made.plan)
        elif not common.json:
            _show(made, image, onto)
        refuse(made.plan)
        if not (does or made.identical):
            _tell_difference(made, image, onto)
        if dry_run or not does:
            return
        if not yes:
            _ask(made)
        with ending_in_order(), common.reporter() as reporter:
            result = execute(made.plan, tree, None, reporter)
    with done_already("the rebase is done"):
        if common.json:
            write_json(document | _result_json(made, result))
        else:
            write(f"{printable(image)} backs on {printable(onto)} now, and reads as before.\n")


def _document(made: Rebase, image: Layer, other: Layer, program: str) -> dict[str, Any]:
    found = made.comparison
    document: dict[str, Any] = {
        "image": absolute(image.path),
        "onto": absolute(other.path),
        "backing": None
        if made.backing_name is None
        else {"name": made.backing_name, "format": other.format},
        "identical": made.identical,
        "first_difference": None if found is None else found.first_difference,
        "different_bytes": 0 if found is None else found.different_bytes,
        "compared_bytes": 0 if found is None else found.compared_bytes,
        "skipped_bytes": 0 if found is None else found.skipped_bytes,
    }
    planned = made.plan.as_json(program)
    return document | {"steps": planned["steps"], "refusals": planned["refusals"]}


def _show(made: Rebase, image: Path, onto: Path) -> None:
    from .tables import size_text

    found = made.comparison
    if found is None:
        return
    compared = size_text(found.compared_bytes)
    names = f"{printable(image)} over {printable(onto)}"
    if found.identical and not made.plan.steps:
        write(f"{printable(image)} backs on {printable(onto)} already: there is nothing to do.\n")
    elif found.identical:
        write(f"{names} reads as before ({compared} compared): only its header changes.\n")
    elif made.plan.steps:
        differs = size_text(found.different_bytes)
        grows = size_text(made.plan.groups[0].candidates[0].target_growth_bytes)
        write(f"{names} would differ in {differs} ({compared} compared).\n")
        write(f"These are pulled into {printable(image.name)}, which grows by up to {grows}.\n")


def _tell_difference(made: Rebase, image: Path, onto: Path) -> None:
    """The answer is no (exit 1)."""
    found = made.comparison
    assert found is not None
    note(
        f"{image}: over {onto} it would not read as before: {found.different_bytes} bytes differ, "
        f"the first at guest offset {found.first_difference}; add --allow-copy to pull them first"
    )
    raise typer.Exit(ExitCode.NO)


def _ask(made: Rebase) -> None:
    """Ask on the terminal. Raises `Refused` unless the answer is yes."""
    question = "Write the new backing file into its header?" if made.identical else "Pull?"
    sys.stderr.write(f"\n{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused("rebase", "not confirmed", "nothing was changed")


def _result_json(made: Rebase, result: MergeResult) -> dict[str, Any]:
    # Where nothing was pulled the proof is the comparison that came before.
    assert made.comparison is not None
    compared = made.comparison.compared_bytes if made.identical else result.compared_bytes
    verified = {"mode": "moved", "compared_bytes": compared, "identical": result.identical}
    return {"verified": verified, "seconds": round(result.seconds, 3)}
