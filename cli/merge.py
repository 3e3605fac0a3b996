"""`qchain merge`: do what `qchain plan` says, and prove that every kept point reads the same."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qchain.errors import Refused, UsageError

from .options import Carrying, Common, Interrupted, Merging, command
from .output import done_already, write, write_json

if TYPE_CHECKING:
    from qchain.plan.plan import Plan
    from qchain.run.execute import MergeResult

    from .planning import Wanted

__all__ = ["carry_out", "ending_in_order", "merge", "result_json", "result_text"]


@command
def merge(
    active: Annotated[
        list[Path],
        typer.Argument(metavar="ACTIVE...", help="The active image; of linked clones all."),
    ],
    merging: Merging,
    common: Common,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Drop points; every kept one reads as before, and is verified."""
    from .planning import asked

    carry_out("merge", active, merging, common, yes, asked(merging))


def carry_out(
    name: str,
    active: Sequence[Path],
    merging: Carrying,
    common: Common,
    yes: bool,
    wanted: Wanted,
    agrees: Callable[[Plan], None] | None = None,
) -> None:
    """Plan what is `wanted` of the chain, show it, ask, do it, tell the outcome.

    Args:
        name: of the command, for its messages.
        agrees: raises when the plan is not what was to come out.

    Raises: whatever planning and merging raise.
    """
    from qchain.run.execute import execute

    from .planning import (
        opened_and_planned,
        program,
        refuse,
        save_plan,
        show_plan,
        write_commands,
    )

    terminal = sys.stdin is not None and sys.stdin.isatty()
    planned = opened_and_planned(active, merging, common, wanted, reads=merging.dry_run)
    with _nothing_changed(), planned as (chain, plan):
        if agrees is not None:
            agrees(plan)
        # What forbids the merge in any case comes first.
        if not (yes or terminal or merging.dry_run or plan.refusals):
            raise UsageError(name, "there is no terminal to ask on", "add --yes to merge unasked")
        document = plan.as_json(program())
        if merging.output is not None:
            save_plan(plan, merging.output)
        if common.json and (plan.refusals or merging.dry_run):
            write_json(document)
        elif merging.dry_run:
            write_commands(plan)
        elif not common.json:
            show_plan(plan)
        refuse(plan)
        if merging.dry_run:
            return
        if not yes and plan.steps:
            _ask(name, plan, common.json)
        with ending_in_order(changing=True):
            with common.reporter() as reporter:
                result = execute(plan, chain, None, reporter)
            with done_already("the merge is done"):
                if common.json:
                    write_json(document | result_json(result))
                elif plan.steps:
                    write(result_text(result))


@contextmanager
def _nothing_changed() -> Iterator[None]:
    """Say so after ^C; once a merge has begun it says itself how it stands."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(*(error.args or ("nothing was changed",))) from None


def _ask(name: str, plan: Plan, shown: bool) -> None:
    """Ask on the terminal. Raises `Refused` unless the answer is yes."""
    from .planning import deleted_names, show_plan

    if shown:
        # stdout is for the JSON document alone.
        show_plan(plan, stderr=True)
    count = sum(len(deleted_names(plan, group)) for group in plan.groups)
    question = f"Merge, and delete {count} file{'s' * (count != 1)}?" if count else "Merge?"
    sys.stderr.write(f"\n{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused(name, "not confirmed", "nothing was changed")


@contextmanager
def ending_in_order(changing: bool = False) -> Iterator[None]:
    """A request to end is as ^C: what has begun is put back, then the process ends.

    `changing`: something may have been changed by then; whoever changes it says what is left.
    """

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        if changing:
            raise Interrupted(*error.args) from None
        raise
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def result_json(result: MergeResult) -> dict[str, Any]:
    """What was verified, with the names that outside scripts rely on."""
    verified = {
        "mode": result.mode,
        "compared_bytes": result.compared_bytes,
        "identical": result.identical,
    }
    return {"verified": verified, "seconds": round(result.seconds, 3)}


def result_text(result: MergeResult) -> str:
    """What was verified, for a person."""
    from .tables import seconds_text, size_text

    took = f"\nMerged in {seconds_text(result.seconds)}; "
    if result.mode == "none":
        return took + "not verified, as asked.\n"
    compared = size_text(result.compared_bytes)
    return took + f"verified ({result.mode}): {compared} compared, all identical.\n"
