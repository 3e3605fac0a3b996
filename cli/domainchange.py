"""`qchain domain delete-snapshot` and `flatten`: files and records change together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qchain.errors import ExitCode, Refused, UsageError, printable

from .domainread import DEFAULT, Connect
from .merge import ending_in_order
from .options import Carrying, Common, command
from .output import done_already, note, write, write_json

if TYPE_CHECKING:
    from qchain.domains.delete import Deletion
    from qchain.domains.inventory import Inventory
    from qchain.run.execute import MergeResult

__all__ = ["Also", "Discard", "Prefer", "Strategy", "Yes", "ask", "delete_snapshot", "flatten"]

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Strategy = Annotated[
    str, typer.Option("--strategy", metavar="HOW", help="auto, pull, commit, both or copy.")
]
Prefer = Annotated[str, typer.Option("--prefer", metavar="WHAT", help="time, writes or space.")]
Also = Annotated[
    list[Path] | None,
    typer.Option(
        "--also",
        metavar="FILE",
        help="An overlay that no record names: keep what it shows, too (repeatable).",
    ),
]
Discard = Annotated[
    bool,
    typer.Option("--discard", help="Delete the files that only an abandoned branch needed."),
]


@command
def delete_snapshot(
    domain: Annotated[str, typer.Argument(metavar="DOM", help="Its name or UUID.")],
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The snapshots.")],
    merging: Carrying,
    common: Common,
    connect: Connect = DEFAULT,
    strategy: Strategy = "auto",
    prefer: Prefer = "time",
    also: Also = None,
    discard: Discard = False,
    yes: Yes = False,
) -> None:
    """Delete external snapshots of a shut-off guest: every other one reads as before."""
    words = f"delete {', '.join(names)}"
    _deleted(
        domain,
        tuple(names),
        merging,
        common,
        connect,
        (strategy, prefer),
        also,
        discard,
        yes,
        words,
    )


@command
def flatten(
    domain: Annotated[str, typer.Argument(metavar="DOM", help="Its name or UUID.")],
    merging: Carrying,
    common: Common,
    connect: Connect = DEFAULT,
    disk: Annotated[
        str | None, typer.Option("--disk", metavar="DEV", help="Only this disk (as vda).")
    ] = None,
    strategy: Strategy = "auto",
    prefer: Prefer = "time",
    also: Also = None,
    discard: Discard = False,
    yes: Yes = False,
) -> None:
    """Forget all snapshots: the live images alone are left, over what was below the first."""
    how = (strategy, prefer)
    _deleted(domain, None, merging, common, connect, how, also, discard, yes, "flatten", disk)


def _all_of(inventory: Inventory, disk: str | None) -> tuple[str, ...]:
    """The names of all snapshots. Raises `UsageError`, `Refused` where `disk` is not possible."""
    if disk is None:
        return tuple(inventory.snapshots)
    if disk not in inventory.disks:
        known = ", ".join(inventory.disks) or "none"
        raise UsageError(disk, f"is no disk of {inventory.name}", f"its disks are: {known}")
    for snapshot in inventory.snapshots.values():
        for other in inventory.disks:
            if other != disk and snapshot.keeps(other) is not None:
                raise Refused(
                    f"--disk {disk}",
                    f"snapshot {snapshot.name} holds {other} too, and would be torn in two",
                    "flatten all disks together: leave --disk out",
                )
    return tuple(inventory.snapshots)


def _deleted(
    domain: str,
    names: tuple[str, ...] | None,
    merging: Carrying,
    common: Common,
    connect: str,
    how: tuple[str, str],
    also: list[Path] | None,
    discard: bool,
    yes: bool,
    words: str,
    disk: str | None = None,
) -> None:
    """Plan the deletion of snapshots (None: of all), show it, ask, do it, tell the outcome."""
    from qchain.domains.connection import Host
    from qchain.domains.delete import Wishes, planned_deletion
    from qchain.domains.inventory import look
    from qchain.domains.work import Tools, carry_out

    from .planning import options_of, qemu_version

    merging.refuse(common)
    if merging.output is not None:
        raise Refused("-o", "a plan for a domain cannot be saved", "leave it out")
    options = options_of(merging, strategy=how[0], prefer=how[1])
    with Host(connect) as host:
        inventory = look(host, domain)
        if names is None:
            names = _all_of(inventory, disk)
            if not names:
                _nothing(inventory.name, common)
                return
        wishes = Wishes(names, options, common.gate(), tuple(also or ()), discard)
        with (
            common.reporter() as reporter,
            planned_deletion(
                host, inventory, wishes, words, reporter.advance, qemu_version()
            ) as deletion,
        ):
            _shown(deletion, merging, common)
            _refused(deletion)
            if merging.dry_run:
                return
            ask(f"domain {inventory.name}", yes, _question(deletion), _shown_to_ask(deletion))
            with ending_in_order(changing=True):
                tools = Tools(observer=reporter)
                result = carry_out(host, deletion.job, tools, deletion.merge)
            with done_already("it is done"):
                _told(deletion, common, result)


def ask(what: str, yes: bool, question: str, lines: str = "") -> None:
    """Ask on the terminal. Raises `Refused` unless the answer is yes, `UsageError` without one."""
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(what, "there is no terminal to ask on", "add --yes to do it unasked")
    sys.stderr.write(f"{lines}\n{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused(what, "not confirmed", "nothing was changed")


def _nothing(name: str, common: Common) -> None:
    if common.json:
        write_json({"domain": name, "deleted_snapshots": [], "deleted_files": [], "refusals": []})
    else:
        write(printable(f"{name}: has no snapshots, nothing to do") + "\n")


def _document(deletion: Deletion) -> dict[str, Any]:
    from .planning import program

    job = deletion.job
    fields: dict[str, Any] = {
        "domain": job.name,
        "deleted_snapshots": _gone_names(deletion),
        "deleted_files": [str(each.path) for each in job.gone],
        "current": job.after.current,
    }
    if deletion.merge is not None:
        fields |= deletion.merge[1].as_json(program())
    return fields | {"refusals": list(deletion.refusals)}


def _gone_names(deletion: Deletion) -> list[str]:
    job = deletion.job
    return [name for name in job.before.snapshots if name not in job.after.snapshots]


def _shown(deletion: Deletion, merging: Carrying, common: Common) -> None:
    from .planning import show_plan, write_commands

    if common.json:
        if deletion.refusals or merging.dry_run:
            write_json(_document(deletion))
        return
    if merging.dry_run and not deletion.refusals:
        if deletion.merge is not None:
            write_commands(deletion.merge[1])
        for path in (each.path for each in deletion.job.gone):
            from .output import shell_word

            write(f"rm {shell_word(str(path))}\n")
        return
    if deletion.merge is not None:
        show_plan(deletion.merge[1])
    if not deletion.refusals:
        write("\n" + _records_text(deletion))


def _records_text(deletion: Deletion) -> str:
    """What becomes of the records, a line each."""
    job, lines = deletion.job, []
    for name in _gone_names(deletion):
        lines.append(f"snapshot {name}: its record goes\n")
    for name, xml in job.after.snapshots.items():
        if xml != job.before.snapshots[name]:
            lines.append(f"snapshot {name}: its record changes\n")
    for each in job.gone:
        lines.append(f"{each.path}: is deleted, nothing needs it any more\n")
    current = job.after.current
    if current != job.before.current:
        lines.append(f"current snapshot: {current or 'none'}\n")
    return "".join(printable(line[:-1]) + "\n" for line in lines)


def _shown_to_ask(deletion: Deletion) -> str:
    return "" if sys.stdout is not None and sys.stdout.isatty() else _records_text(deletion)


def _question(deletion: Deletion) -> str:
    names = _gone_names(deletion)
    files = len(deletion.job.drop) + len(deletion.job.gone)
    snapshots = f"{len(names)} snapshot{'s' * (len(names) != 1)}"
    return f"Delete {snapshots} and {files} file{'s' * (files != 1)}?"


def _refused(deletion: Deletion) -> None:
    if deletion.refusals:
        more = len(deletion.refusals) - 1
        rest = f" ({more} more reason{'s' * (more != 1)}: see --json)" if more else ""
        note(f"{deletion.refusals[0]}{rest}")
        raise typer.Exit(ExitCode.REFUSED)


def _told(deletion: Deletion, common: Common, result: MergeResult | None) -> None:
    from .merge import result_json, result_text

    if common.json:
        write_json(_document(deletion) | ({} if result is None else result_json(result)))
        return
    if result is not None:
        write(result_text(result))
    names = ", ".join(_gone_names(deletion))
    write(printable(f"{deletion.job.name}: {names} deleted; virsh shows it.") + "\n")
