"""`qchain domain snapshot` and `revert`: new overlays, the definition and the records together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qchain.errors import ExitCode, printable

from .domainchange import Discard, Yes, ask
from .domainread import DEFAULT, Connect
from .merge import ending_in_order
from .options import Common, command
from .output import done_already, note, write, write_json

if TYPE_CHECKING:
    from qchain.domains.branch import Branch
    from qchain.domains.connection import Host

__all__ = ["revert", "snapshot"]

_Domain = Annotated[str, typer.Argument(metavar="DOM", help="Its name or UUID.")]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="The snapshot.")]


@command
def snapshot(
    domain: _Domain,
    name: _Name,
    common: Common,
    connect: Connect = DEFAULT,
    description: Annotated[
        str, typer.Option("--description", metavar="TEXT", help="What it is for.")
    ] = "",
    keep_active_name: Annotated[
        bool,
        typer.Option(
            "--keep-active-name",
            help="The new overlays take the live names, the present images get new ones.",
        ),
    ] = False,
) -> None:
    """Take an external snapshot of all disks of a shut-off guest."""
    from qchain.domains.branch import plan_snapshot
    from qchain.domains.connection import Host
    from qchain.domains.inventory import look

    with Host(connect) as host:
        branch = plan_snapshot(
            host,
            look(host, domain),
            name,
            common.gate(),
            description=description,
            keep_active_name=keep_active_name,
        )
        _refused(branch, common)
        _done(host, branch, common)
    if not common.json:
        for make in branch.job.make:
            write(printable(f"{make.path} is live, over {make.below}") + "\n")


@command
def revert(
    domain: _Domain,
    name: _Name,
    common: Common,
    connect: Connect = DEFAULT,
    discard: Discard = False,
    yes: Yes = False,
) -> None:
    """Go back to a snapshot, on a branch of its own: every snapshot stays as it is."""
    from qchain.domains.branch import plan_revert
    from qchain.domains.connection import Host
    from qchain.domains.inventory import look

    with Host(connect) as host:
        branch = plan_revert(host, look(host, domain), name, common.gate(), discard=discard)
        _refused(branch, common)
        job = branch.job
        lines = "".join(f"{printable(each.path)} is deleted\n" for each in job.gone)
        count = len(job.gone)
        files = f" and delete {count} file{'s' * (count != 1)}" if count else ""
        ask(f"domain {job.name}", yes, f"Revert {printable(job.name)} to {name}{files}?", lines)
        _done(host, branch, common)
    if common.json:
        return
    for make in job.make:
        write(printable(f"{make.path} is live, over {make.below}") + "\n")
    for path in branch.left:
        left = (
            f"{path} keeps what the guest had, but is no snapshot's; --discard deletes such files"
        )
        write(printable(left) + "\n")


def _refused(branch: Branch, common: Common) -> None:
    if not branch.refusals:
        return
    if common.json:
        write_json(_document(branch))
    more = len(branch.refusals) - 1
    rest = f" ({more} more reason{'s' * (more != 1)}: see --json)" if more else ""
    note(f"{branch.refusals[0]}{rest}")
    raise typer.Exit(ExitCode.REFUSED)


def _done(host: Host, branch: Branch, common: Common) -> None:
    from qchain.domains.work import Tools, carry_out

    with ending_in_order(changing=True):
        with common.reporter() as reporter:
            carry_out(host, branch.job, Tools(observer=reporter))
        with done_already("it is done"):
            if common.json:
                write_json(_document(branch))


def _document(branch: Branch) -> dict[str, Any]:
    job = branch.job
    return {
        "domain": job.name,
        "current": job.after.current,
        "overlays": [{"path": str(each.path), "below": str(each.below)} for each in job.make],
        "left": [str(path) for path in branch.left],
        "deleted_files": [str(each.path) for each in job.gone],
        "refusals": list(branch.refusals),
    }
