"""What plan and merge share: make the plan, show it, refuse."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import typer

from qchain.errors import ExitCode, Refused, UsageError, printable

from .options import Carrying, Common, Merging
from .output import console, note, save_json, shell_word, write
from .tables import count_text

if TYPE_CHECKING:
    from rich.console import Console

    from qchain.chain.chain_tree import ChainTree
    from qchain.plan.options import MergeOptions
    from qchain.plan.plan import GroupPlan, Plan
    from qchain.plan.selection import Request
    from qchain.plan.steps import Step

__all__ = [
    "Wanted",
    "asked",
    "opened_and_planned",
    "options_of",
    "program",
    "qemu_version",
    "refuse",
    "save_plan",
    "show_plan",
    "write_commands",
]

Wanted: TypeAlias = "Callable[[ChainTree], tuple[Request, MergeOptions]]"
"""What is to be done to a tree, known once it is open."""

_AT_RISK = {"none": "nothing", "dropped": "dropped"}

_SHOWN = 5  # images of a group that are named in a drawing


def asked(merging: Merging) -> Wanted:
    """What the options of plan and merge ask for, whatever the chain.

    Raises: `UsageError`, `Refused` for what this version lacks.
    """
    from qchain.plan.selection import Request

    request = Request(
        drop=tuple(merging.drop or ()),
        keep=tuple(merging.keep or ()),
        flatten=merging.flatten,
        collapse=merging.collapse,
    )
    if sum((bool(request.drop), bool(request.keep), request.flatten, request.collapse)) != 1:
        why = "exactly one of --drop, --keep, --flatten, --collapse is needed"
        raise UsageError("which points", why, "say what is to be dropped or kept")
    options = options_of(
        merging,
        strategy=merging.strategy,
        names=merging.names,
        prefer=merging.prefer,
        allow_format_change=merging.allow_format_change,
    )
    return lambda _: (request, options)


def options_of(carrying: Carrying, **more: Any) -> MergeOptions:
    """The options that all merging commands have, and `more` of `MergeOptions`.

    Raises: as `MergeOptions`.
    """
    from qchain.plan.options import MergeOptions

    return MergeOptions(
        engine=carrying.engine,
        verify=carrying.verify,
        scan=tuple(carrying.scan or ()),
        exact=carrying.exact,
        keep_files=carrying.keep_files,
        bitmaps=carrying.bitmaps,
        **more,
    )


@contextmanager
def opened_and_planned(
    active: Sequence[Path],
    carrying: Carrying,
    common: Common,
    wanted: Wanted,
    *,
    reads: bool = False,
) -> Iterator[tuple[ChainTree, Plan]]:
    """Open the images and plan the merge that is `wanted` of them; closed on leaving.

    `reads`: nothing more is to be done than that.

    Raises: `Refused` (in use, a backing format that is not recorded, options of
        reading), `UsageError`, other `ImageError`s.
    """
    from qchain.chain.chain import FormatNotRecorded
    from qchain.plan.plan import make_plan

    from .opening import open_tree_for

    carrying.refuse(common)
    for directory in carrying.scan or ():
        if not directory.is_dir():
            raise UsageError(directory, "is no directory", "give --scan a directory")
    try:
        tree = open_tree_for(active, common, reads=reads)
    except FormatNotRecorded as error:
        raise Refused(error.what, error.why, error.todo) from None
    with tree:
        request, options = wanted(tree)
        with common.reporter() as reporter:
            reporter.step("planning", sum(tree.layers[index].size for index in tree.actives))
            plan = make_plan(
                tree, request, options, progress=reporter.advance, version=qemu_version()
            )
        yield tree, plan


def qemu_version() -> tuple[int, int, int] | None:
    """Of the qemu-img that would do the work; None where there is none: a plan needs it not."""
    from qchain.errors import ImageError
    from qchain.run.qemu_img import QemuImg

    try:
        return QemuImg().version()
    except ImageError:
        return None


def program() -> str:
    """The name of qemu-img in commands that are shown."""
    return os.environ.get("QCHAIN_QEMU_IMG") or "qemu-img"


def save_plan(plan: Plan, path: Path) -> None:
    """Save the plan, for `qchain apply`, and tell so. Raises: as `save_json`."""
    from qchain.run.saved import saved_document

    save_json(saved_document(plan, program()), path)
    if not plan.refusals:
        note(f"plan written to {path}")


def refuse(plan: Plan) -> None:
    """The refusals of the plan are the end (exit 3): the first in words, the others counted.

    An error is one line, and to do what the first asks for is the next step in any case.
    """
    if not plan.refusals:
        return
    more = len(plan.refusals) - 1
    rest = f" ({count_text(more, 'more reason')}: see --json)" if more else ""
    note(f"{plan.refusals[0]}{rest}")
    raise typer.Exit(ExitCode.REFUSED)


def write_commands(plan: Plan) -> None:
    """The commands of the plan in order, one per line, quoted for a shell."""
    from qchain.plan.steps import shell_line

    for step in plan.steps:
        line = shell_line(step, program())
        if line is not None:
            write((line if line.isprintable() else _escaped(step)) + "\n")


def _escaped(step: Step) -> str:
    """The line of a step whose names hold what no terminal should get."""
    from qchain.plan.steps import Command, arguments

    line = " ".join(shell_word(word) for word in arguments(step, program()) or ())
    if isinstance(step, Command) and step.cwd is not None:
        return f"(cd {shell_word(str(step.cwd))} && {line})"
    return line


def show_plan(plan: Plan, stderr: bool = False) -> None:
    """The plan for a person: per group the chain before and after, the candidates, the choice."""
    from .tables import safe, size_text

    out = console(stderr)
    if not plan.groups:
        out.print(safe("Nothing is dropped: there is nothing to do."))
    described: list[dict[str, Any]] = plan.as_json(program())["groups"]  # type: ignore[assignment]
    for number, (group, fields) in enumerate(zip(plan.groups, described, strict=True), 1):
        if number > 1:
            out.print()
        if len(plan.groups) > 1:
            out.print(safe(f"Group {number} of {len(plan.groups)}"))
        _show_group(out, plan, group, fields)
    if len(plan.refusals) > 1:
        out.print()
        # On a terminal stderr shows the first right below.
        for line in plan.refusals[1 if _one_screen() else 0 :]:
            out.print(safe(f"refused: {line}"))
    chosen = [group.chosen for group in plan.groups if group.chosen is not None]
    if len(chosen) > 1:
        grows = size_text(sum(each.target_growth_bytes for each in chosen))
        frees = size_text(sum(each.freed_bytes for each in chosen))
        out.print()
        out.print(safe(f"All groups together: files grow by {grows}, {frees} are freed."))
    if plan.groups:
        out.print()
        out.print(safe(f"Times are {plan.model.source}."))
        out.print(safe("At risk: points that a stop midway may spoil; kept ones never are."))
        where = ", ".join(plan.scanned)
        out.print(safe(f"Other overlays were looked for in {where}; elsewhere only with --scan."))
    if plan.steps and not stderr:
        out.print()
        out.print(safe(f"{len(plan.steps)} steps; --dry-run prints the commands."))


def _one_screen() -> bool:
    """Whether stdout and stderr are both a terminal, so that a line on either is seen."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


def deleted_names(plan: Plan, group: GroupPlan) -> list[str]:
    """The file names of the images that go away with `group`."""
    if plan.options.keep_files or group.result is None:
        return []
    members = [plan.layers[index] for index in group.group.owned]
    return [
        layer.path.name
        for layer in members
        if layer.path.absolute() != group.result and not layer.file.is_block_device
    ]


def _devices_left(plan: Plan, group: GroupPlan) -> list[str]:
    """The block devices that are not needed any more: whoever made them takes them away."""
    if group.result is None:
        return []  # nothing will be done
    members = [plan.layers[index] for index in group.group.owned]
    return [
        str(layer.path)
        for layer in members
        if layer.file.is_block_device and layer.path.absolute() != group.result
    ]


def _bitmap_lines(group: GroupPlan) -> list[tuple[str, str]]:
    """Which bitmaps the result has, and every one that vanishes by name."""
    carried = ", ".join(each.name for each in group.bitmaps.carried)
    lost = [f"{each.name} of {each.image.name} ({each.why})" for each in group.bitmaps.lost]
    lines = [("bitmaps", f"{carried} carried over")] if carried else []
    return [*lines, *(("loses", f"the bitmap {each}") for each in lost)]


def _show_group(out: Console, plan: Plan, group: GroupPlan, fields: dict[str, Any]) -> None:
    from .tables import facts, safe, seconds_text, size_text, table

    names = [layer.path.name for layer in plan.layers]
    below = [] if group.group.below is None else [names[group.group.below]]
    kept = names[group.group.kept]
    dropped = [names[index] for index in group.group.dropped]
    if len(dropped) > _SHOWN:
        dropped = [*dropped[: _SHOWN - 2], f"({len(dropped) - _SHOWN + 1} more)", dropped[-1]]
    result = kept if group.result is None else group.result.name
    lines = [
        ("before", " -> ".join([kept, *dropped, *below])),
        ("after", " -> ".join([result, *below])),
    ]
    gone = deleted_names(plan, group)
    if gone:
        lines.append(
            ("deletes", ", ".join(gone if len(gone) <= _SHOWN else [f"{len(gone)} files"]))
        )
    if result != kept and not plan.options.keep_files:
        lines.append(("renames", f"{kept} goes; what used it is to use {result}"))
    if plan.options.keep_files and group.result is not None:
        # Its content is in the result; by itself it may miss a backing file.
        lines.append(("keeps", "the files; a replaced one as NAME.qchain-old, not readable alone"))
    for layer in (plan.layers[index] for index in group.group.owned):
        link = plan.links.get(layer.path)
        if link is not None and layer.path.name in gone:
            lines.append(("leaves", f"{link}, a link that leads nowhere then"))
    for device in _devices_left(plan, group):
        lines.append(("frees", f"{device}, a block device: nothing needs it then, remove it"))
    shared = [names[index] for index in group.group.shared]
    if shared:
        said = ", ".join(shared if len(shared) <= _SHOWN else [f"{len(shared)} files"])
        lines.append(("leaves", f"{said} (others still back on it)"))
    lines += _bitmap_lines(group)
    drawn = facts(lines, out.width)
    out.print(drawn, end="", soft_wrap=True)
    rows = []
    native = any(candidate.engine == "native" for candidate in group.candidates)
    for candidate in group.candidates:
        if candidate.feasible:
            rows.append(
                (
                    "*" if candidate is group.chosen else "",
                    candidate.strategy,
                    *([candidate.engine] if native else []),
                    "a new file" if candidate.target is None else names[candidate.target],
                    size_text(candidate.read_bytes),
                    size_text(candidate.write_bytes),
                    size_text(candidate.target_growth_bytes),
                    size_text(candidate.freed_bytes),
                    seconds_text(candidate.seconds),
                    _AT_RISK[candidate.risk],
                )
            )
    if rows:
        heads = (
            "",
            "strategy",
            *(["engine"] if native else []),
            "into",
            "reads>",
            "writes>",
            "grows>",
            "frees>",
            "time>",
            "at risk",
        )
        out.print()
        out.print(table(heads, rows, out.width))
    for candidate in group.candidates:
        # What is shared is named above, at "leaves".
        left_out = (candidate.reason or "").startswith(("--strategy ", "--engine "))
        left_out = left_out or candidate.target in group.group.shared
        if not candidate.feasible and not left_out:
            into = "a new file" if candidate.target is None else names[candidate.target]
            text = f"  {candidate.strategy} into {into}: not possible: {candidate.reason}"
            out.print(safe(text))
    chosen = str(fields["why"])
    out.print()
    out.print(safe(f"Chosen: {chosen}." if group.chosen is not None else f"{printable(chosen)}."))
