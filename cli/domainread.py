"""`qchain domain list` and `show`: domains of libvirt, their chains and snapshot records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Common, command
from .output import note, write, write_json

if TYPE_CHECKING:
    from qchain.domains.files import Files
    from qchain.domains.inventory import Inventory
    from qchain.domains.truth import Problem

__all__ = ["DEFAULT", "Connect", "list_", "opened_files", "problem_json", "said", "show"]

Connect = Annotated[
    str, typer.Option("--connect", "-c", metavar="URI", help="The libvirt to talk to.")
]
DEFAULT = "qemu:///system"


@command
def list_(common: Common, connect: Connect = DEFAULT) -> None:
    """List the domains: state, disks, depth of their chains, snapshots, what is out of step."""
    from qchain.domains.connection import Host
    from qchain.domains.inventory import look
    from qchain.domains.truth import problems_of

    rows = []
    with Host(connect) as host:
        for handle in host.domains():
            inventory = look(host, str(handle.UUIDString()))
            files = opened_files(inventory, common)
            rows.append((inventory, files, problems_of(inventory, files)))
    if common.json:
        write_json({"domains": [_summary(*row) for row in rows]})
        return
    from .tables import size_text, write_table

    if not rows:
        write("no domains\n")
        return
    cells = []
    for inventory, files, problems in rows:
        fields = _summary(inventory, files, problems)
        cells.append(
            (
                inventory.name,
                fields["state"],
                " ".join(inventory.disks),
                str(fields["depth"]),
                str(len(inventory.snapshots)),
                inventory.current or "-",
                size_text(fields["disk_size"]),
                size_text(fields["shadowed_bytes"]),
                str(len(problems)) if problems else "-",
            )
        )
    heads = (
        *("domain", "state", "disks", "depth>", "snapshots>", "current"),
        *("on disk>", "shadowed>", "out of step>"),
    )
    write_table(heads, cells)


@command
def show(
    domain: Annotated[str, typer.Argument(metavar="DOM", help="Its name or UUID.")],
    common: Common,
    connect: Connect = DEFAULT,
) -> None:
    """Show a domain's snapshot tree beside its files: which is whose state, which its overlay."""
    from qchain.domains.connection import Host
    from qchain.domains.inventory import look
    from qchain.domains.truth import problems_of

    with Host(connect) as host:
        inventory = look(host, domain)
        files = opened_files(inventory, common)
    problems = problems_of(inventory, files)
    if common.json:
        write_json(_details(inventory, files, problems))
        return
    from .domainpicture import picture

    write(picture(inventory, files))
    for path in _unfinished(files):
        note(f"{path}: a change is not finished; 'qchain recover {path.parent}' continues it")
    for problem in problems:
        note(f"{inventory.name}: {said(problem)}; see 'qchain domain repair'")


def opened_files(
    inventory: Inventory, common: Common, more: tuple[Path, ...] = ()
) -> dict[str, Files]:
    """The images of every disk of a domain, by target; headers only."""
    from qchain.domains.files import files_of

    gate = common.gate()
    names = [str(path.absolute()) for path in more]
    return {target: files_of(inventory, target, gate, names) for target in inventory.disks}


def said(problem: Problem) -> str:
    """A problem in words."""
    whose = "" if problem.snapshot is None else f"snapshot {problem.snapshot}, "
    return f"{whose}{problem.target}: {problem.text}"


def _summary(
    inventory: Inventory, files: dict[str, Files], problems: list[Problem]
) -> dict[str, Any]:
    lines = [
        files[target].line(disk.source.path)
        for target, disk in inventory.disks.items()
        if disk.source.path is not None
    ]
    images = {name: image for each in files.values() for name, image in each.images.items()}
    return {
        "name": inventory.name,
        "uuid": inventory.uuid,
        "state": "running" if inventory.active else "shut off",
        "persistent": inventory.persistent,
        "managed_save": inventory.managed_save,
        "disks": list(inventory.disks),
        "depth": max((len(line) for line in lines), default=0),
        "snapshots": len(inventory.snapshots),
        "current": inventory.current,
        "disk_size": sum(image.disk_size for image in images.values()),
        "shadowed_bytes": sum(_shadowed(line[0]) for line in lines if line),
        "problems": [problem_json(problem) for problem in problems],
        "unfinished": [str(path) for path in _unfinished(files)],
    }


def _unfinished(files: dict[str, Files]) -> list[Path]:
    from qchain.chain.scan import unfinished_domains

    return unfinished_domains({place for each in files.values() for place in each.places()})


def _shadowed(live: str) -> int:
    """Bytes of the live chain that lie hidden below newer ones: what a flatten gives back."""
    from qchain.chain.chain import open_chain
    from qchain.chain.gate import Gate
    from qchain.chain.ownership import ownership

    with open_chain(live, Gate(follow=True)) as chain:
        return sum(each.shadowed for each in ownership(chain.layers))


def problem_json(problem: Problem) -> dict[str, Any]:
    """A problem, with the names that outside scripts rely on."""
    return {
        "kind": problem.kind,
        "disk": problem.target,
        "snapshot": problem.snapshot,
        "text": problem.text,
    }


def _details(
    inventory: Inventory, files: dict[str, Files], problems: list[Problem]
) -> dict[str, Any]:
    fields = _summary(inventory, files, problems)
    fields["disks"] = [
        {
            "disk": target,
            "live": disk.source.path,
            "format": disk.source.format,
            "chain": files[target].line(disk.source.path),
            "images": [
                {
                    "path": image.path,
                    "format": image.format,
                    "virtual_size": image.virtual_size,
                    "disk_size": image.disk_size,
                    "backing": image.below,
                    "owner": image.owner,
                }
                for image in files[target].images.values()
            ],
        }
        for target, disk in inventory.disks.items()
    ]
    fields["snapshots"] = [
        {
            "name": snapshot.name,
            "parent": snapshot.parent,
            "created": snapshot.created,
            "state": snapshot.state,
            "current": snapshot.name == inventory.current,
            "memory": snapshot.memory,
            "disks": [
                {
                    "disk": target,
                    "mode": overlay.mode,
                    "state": snapshot.keeps(target),
                    "overlay": None if overlay.source is None else overlay.source.path,
                }
                for target, overlay in snapshot.overlays.items()
                if target in inventory.disks
            ],
        }
        for snapshot in inventory.snapshots.values()
    ]
    return fields
