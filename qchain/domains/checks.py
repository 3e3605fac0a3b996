"""Reasons not to touch a domain, each one line with the way on."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qchain.chain.scan import unfinished_domains
from qchain.domains.connection import Host
from qchain.domains.files import Files
from qchain.domains.inventory import Inventory, others
from qchain.domains.truth import problems_of

__all__ = ["domain_refusals", "record_refusals", "unfinished_refusals", "use_refusals"]


def domain_refusals(inventory: Inventory, live: str) -> list[str]:
    """What forbids to change anything of a domain.

    Args:
        live: the command that does it while the guest runs.
    """
    name, out = inventory.name, []
    if inventory.active:
        out.append(f"{name}: is running; shut it off, or use '{live}'")
    if not inventory.persistent:
        out.append(f"{name}: is transient, its definition ends with it; define it first")
    if inventory.managed_save:
        out.append(
            f"{name}: has a managed save, whose RAM belongs to the disks as they are; start it "
            f"and shut it off, or 'virsh managedsave-remove {name}'"
        )
    if inventory.checkpoints:
        out.append(
            f"{name}: has {len(inventory.checkpoints)} checkpoint(s), whose bitmaps would be lost; "
            f"'virsh checkpoint-delete {name} {inventory.checkpoints[0]}' first"
        )
    for target, disk in inventory.disks.items():
        if disk.source.kind not in ("file", "block", "volume") or disk.source.path is None:
            held = [each.name for each in inventory.snapshots.values() if each.keeps(target)]
            if held or disk.source.path is not None:
                out.append(
                    f"{name}: its disk {target} is of type {disk.source.kind}, and only local "
                    "files and block devices can be worked on"
                )
    return out


def record_refusals(inventory: Inventory, files: Mapping[str, Files]) -> list[str]:
    """Records that are not true: what is built on them would not be either.

    Those of a change that was stopped cannot be, and that is said first.
    """
    out = unfinished_refusals(inventory, files)
    if out:
        return out
    for problem in problems_of(inventory, files):
        whose = "" if problem.snapshot is None else f"snapshot {problem.snapshot}, "
        out.append(
            f"{inventory.name}: {whose}{problem.target}: {problem.text}; "
            f"'qchain domain repair {inventory.name}' first"
        )
    return out


def unfinished_refusals(inventory: Inventory, files: Mapping[str, Files]) -> list[str]:
    """Changes to domains that were stopped, in the directories of the images."""
    places = {place for each in files.values() for place in each.places()}
    return [
        f"{inventory.name}: a change is not finished ({path}); 'qchain recover {path.parent}' first"
        for path in unfinished_domains(places)
    ]


def use_refusals(host: Host, inventory: Inventory, changed: Collection[str]) -> list[str]:
    """Other domains of the host, and their snapshots, that name a file that changes.

    Args:
        changed: files by real name.
    """
    out = {}
    for use in others(host, inventory.uuid):
        if use.path in changed:
            out[use.path, use.who] = (
                f"{use.path}: {use.who} uses it; take it out of there, or keep what it needs"
            )
    return list(out.values())
