"""Reasons not to touch a chain at all: each one line, with the way on."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from qchain.chain.chain_tree import ChainTree
from qchain.chain.layer import Layer
from qchain.chain.names import resolve_backing
from qchain.chain.scan import (
    DOMAIN_SUFFIX,
    WORK_PREFIX,
    Unseen,
    identity,
    journal_names,
    overlays_in,
    places_of,
    unfinished,
    unfinished_domains,
)
from qchain.hostfile import FileId, mount_id
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Group

__all__ = [
    "above_refusals",
    "file_refusals",
    "overlay_refusals",
    "scanned",
    "space_refusals",
    "stranger_refusals",
    "unfinished_refusals",
]


def file_refusals(layers: Sequence[Layer], group: Group) -> list[str]:
    """What makes a file of the group unfit to be merged."""
    out: list[str] = []
    for index in group.members:
        layer = layers[index]
        path, header = layer.path, layer.header
        out += _unfit(layer)
        if header is None:
            continue
        if header.nb_snapshots:
            out.append(
                f"{path}: holds {header.nb_snapshots} internal snapshot(s), which the merge would "
                "lose or change; delete them first ('qemu-img snapshot -d')"
            )
    for position, index in enumerate(group.members):
        below = group.line[position + 1] if position + 1 < len(group.line) else None
        out += _name_refusals(layers, index, below)
    for index in group.members[:-1]:
        backing = layers[index].backing
        if backing is not None and backing.format is None:
            out.append(
                f"{layers[index].path}: the format of its backing file is not recorded; record it "
                f"with 'qemu-img rebase -u -b {backing.name} -F qcow2|raw'"
            )
    lowest = layers[group.members[-1]]
    if group.below is not None and lowest.backing is not None and lowest.backing.format is None:
        out.append(f"{lowest.path}: the format of its backing file is not recorded; record it")
    return out


def _unfit(layer: Layer) -> list[str]:
    """What forbids to write to a file at all, if only to its header."""
    out: list[str] = []
    path, header = layer.path, layer.header
    if layer.file.is_block_device:
        pass  # LVM's names are links, and nothing is renamed
    elif path.is_symlink():
        real = os.path.realpath(path)
        out.append(
            f"{path}: is a symbolic link, and from where it leads its backing name means "
            f"something else; record an absolute one ('qemu-img rebase -u'), or name {real} itself"
        )
    elif mount_id(path) != mount_id(path.parent):
        out.append(f"{path}: is a mount point, and cannot be renamed; merge it where it lies")
    status = os.fstat(layer.file.fd)
    if status.st_nlink > 1 and not layer.file.is_block_device:
        out.append(
            f"{path}: the file has {status.st_nlink} names (hard links), and a merge would "
            "change or part them; remove the others first"
        )
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        out.append(f"{path}: the file or its directory cannot be written to; run as its owner")
    if header is None:
        return out
    if header.corrupt:
        out.append(f"{path}: is marked corrupt; see 'qemu-img check'")
    if header.dirty:
        out.append(f"{path}: was not closed properly; 'qemu-img check -r all' first")
    if header.encryption:
        out.append(f"{path}: is encrypted ({header.encryption}); merging it is not supported")
    if header.has_data_file:
        out.append(f"{path}: has an external data file; merging it is not supported")
    return out


def above_refusals(tree: ChainTree, group: Group, target: int, options: MergeOptions) -> list[str]:
    """What makes an image above the kept one unfit, where its header is led to another name.

    That happens after the switch: it must not fail. A member of another group is none of
    these; `file_refusals` has looked at it.
    """
    renamed = options.names == "lowest" or (options.names == "target" and target != group.kept)
    if not renamed:
        return []
    way = "or use --names kept, which leaves it alone"
    return [
        f"{line}; {way}"
        for index in tree.overlays[group.kept]
        for line in _unfit(tree.layers[index])
    ]


def _name_refusals(layers: Sequence[Layer], index: int, below: int | None) -> list[str]:
    """Backing names that qemu-img would take for another file than the plan does: `below`."""
    layer = layers[index]
    if layer.backing is None:
        return []
    named = resolve_backing(layer.backing.name, layer.backing.format, layer.path)
    name = f"{layer.path}: its backing name {layer.backing.name[:80]!r}"
    if not named.plain:
        return [f"{name} is not a plain file name; record one with 'qemu-img rebase -u'"]
    if below is None or identity(named.path) != layers[below].file.id:
        return [f"{name} is not where it says; record the right one with 'qemu-img rebase -u'"]
    return []


def overlay_refusals(
    layers: Sequence[Layer], groups: Sequence[Group], options: MergeOptions
) -> list[str]:
    """Images outside the chain that back on something the merge would change or remove."""
    touched = {
        index
        for group in groups
        for index in (
            # A kept name that stays what it was concerns nobody above it.
            group.dropped
            if options.names == "kept" and not options.allow_format_change
            else group.members
        )
    }
    changed = {layers[index].file.id: layers[index].path for index in touched}
    own = {layer.file.id for layer in layers}
    return stranger_refusals(changed, own, scanned(layers, groups, options))


def scanned(layers: Sequence[Layer], groups: Sequence[Group], options: MergeOptions) -> list[Path]:
    """The directories in which overlays are looked for, not what lies below them."""
    own = {layers[index].path.parent for group in groups for index in group.members}
    return [*sorted(own), *options.scan]


def stranger_refusals(
    changed: Mapping[FileId, Path], own: Collection[FileId], directories: Iterable[Path]
) -> list[str]:
    """Images in `directories` that refer to a file that a merge changes or removes.

    Args:
        changed: these files, and their names.
        own: the files of the chain itself, which may.
    """
    if not changed:
        return []
    names = {path.name: path for path in changed.values()}
    out: list[str] = []
    unseen: list[Unseen] = []
    for found in overlays_in(directories):
        if isinstance(found, Unseen):
            unseen.append(found)
            continue
        if found.id in own:
            continue
        if found.backing_id is None:
            below = names.get(found.backing.name)
        else:
            below = changed.get(found.backing_id)
        if below is not None:
            perhaps = "" if found.backing_id is not None else "perhaps "
            out.append(
                f"{found.path}: {perhaps}{found.use} {below.name}, which the merge would change; "
                f"keep {below.name}, merge that overlay too (name its active image as well), or "
                "rebase it onto another image"
            )
    if unseen:
        more = f" (and {len(unseen) - 1} more)" if len(unseen) > 1 else ""
        out.append(
            f"{unseen[0].path}: {unseen[0].why}{more}, and it may back on what the merge would "
            "change; run as its owner, or move it"
        )
    return out


def unfinished_refusals(
    layers: Sequence[Layer], groups: Sequence[Group], token: str = ""
) -> list[str]:
    """Merges in the chain's directories that were stopped and not finished.

    Those of other chains, which share with it what neither merges, do not matter.

    Args:
        token: of the change to a domain that the merge is a part of.
    """
    names = [os.path.realpath(layer.path) for layer in layers]
    merged = {names[index] for group in groups for index in group.members}
    out = []
    for path in unfinished({place for layer in layers for place in places_of(layer.path)}):
        known = journal_names(path)
        if known is not None and merged.isdisjoint(known[0]) and known[1].isdisjoint(names):
            continue
        out.append(
            f"{path}: a merge of this chain is not finished; 'qchain recover {path.parent}' first"
        )
    out += [
        f"{path}: a change to a domain is not finished here; 'qchain recover {path.parent}' first"
        for path in unfinished_domains({layer.path.absolute().parent for layer in layers})
        if path.name != f"{WORK_PREFIX}{token}{DOMAIN_SUFFIX}"
    ]
    return out


def space_refusals(peaks: Mapping[int, int], directories: Iterable[Path]) -> list[str]:
    """Filesystems without room.

    Args:
        peaks: what each (`st_dev`) has to give at most, bytes.
        directories: some on each of them, by which it is known.
    """
    places = {directory.stat().st_dev: directory for directory in dict.fromkeys(directories)}
    out = []
    for device, directory in places.items():
        amount = peaks.get(device, 0)
        room = os.statvfs(directory)
        free = room.f_bavail * room.f_frsize
        if amount > free:
            out.append(
                f"{directory}: the merge needs up to {amount} bytes there and {free} are free; "
                "make room, or try --prefer space"
            )
    return out
