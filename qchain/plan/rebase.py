"""Lead an image to another backing file (qemu-img's safe rebase): the proof, and the steps.

image   . I . I . .          what it allocates stays its own
old     O O . O O .
new     O N . N O O          compared where the image allocates nothing: cell 2 is zero on
                             both sides, cell 5 differs, the rest is equal

Where nothing differs only the header changes. Else what differs is pulled into the image
first, in the two phases of `qchain.plan.sequence`. The image reads the same all along, so
that what backs on it does not matter.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from qchain.chain.chain_tree import ChainTree
from qchain.chain.layer import Layer, Qcow2Layer
from qchain.plan.candidates import Candidate
from qchain.plan.choice import GroupPlan
from qchain.plan.naming import naming_refusals
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan
from qchain.plan.refusals import file_refusals, space_refusals, unfinished_refusals
from qchain.plan.selection import Group
from qchain.plan.sequence import repoint, sequence
from qchain.plan.steps import Command, Step
from qchain.plan.traffic import Traffic
from qchain.verify.compare import MAX_RANGES, Comparison, compare

__all__ = ["Rebase", "plan_rebase"]


@dataclass(frozen=True)
class Rebase:
    """How an image is led to another backing file.

    Attributes:
        plan: what `qchain.run.execute` does; without groups there is nothing to do, or it
            may not be done.
        comparison: of the image over its present backing file and over the new one; None
            where something speaks against it anyway.
    """

    plan: Plan
    comparison: Comparison | None = None

    @property
    def identical(self) -> bool:
        return self.comparison is not None and self.comparison.identical

    @property
    def backing_name(self) -> str | None:
        """The name that the header will have; None where nothing is done."""
        for step in reversed(self.plan.steps):
            if isinstance(step, Command) and step.argv[:2] == ("rebase", "-u"):
                return step.argv[step.argv.index("-b") + 1]
        return None


def plan_rebase(
    tree: ChainTree,
    other: int,
    *,
    allow_copy: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Rebase:
    """Plan to lead the first layer of `tree` to the layer `other`, as `open_pair` gives them.

    Args:
        allow_copy: pull what differs; else nothing is done where anything does.
        progress: called with (guest bytes compared, guest bytes in all).

    Raises: `ImageError` when an image cannot be read. What speaks against it is in the
        plan's refusals.
    """
    layers, options = tree.layers, MergeOptions()
    group = Group(tree.line(0), 1, 1, tree.line(other))
    refusals = _refusals(tree, group)
    if refusals:
        return Rebase(Plan(tree, options, (), tuple(dict.fromkeys(refusals))))
    old = [layers[index] for index in group.line]
    new = [layers[0], *(layers[index] for index in group.onto)]
    found = compare(old, new, progress=progress)
    nothing = Rebase(Plan(tree, options, (), ()), found)
    if not (found.identical or allow_copy):
        return nothing
    # Not to be told from the journal's name, which all can see before the work begins.
    token, secret = secrets.token_hex(3), secrets.token_hex(8)
    way = _candidate(layers[0], old, found)
    steps: list[Step]
    if found.identical:
        steps, result = repoint(layers, group, way, options)
        if _already(layers, group, steps):
            return nothing
    else:
        steps, result = sequence(layers, group, way, options, secret, ())
        header = layers[0].header
        if header is not None and header.version == 2 and layers[0].backing is None:
            # Its zero writes only let go of clusters, and then the new backing shows through.
            refusals.append(
                f"{layers[0].path}: has compat 0.10 and no backing file: what must read as zeroes "
                "cannot be written; 'qemu-img amend -o compat=1.1' first"
            )
        place = layers[0].path.parent
        refusals += space_refusals({place.stat().st_dev: way.peak_extra_bytes}, [place])
    refusals += naming_refusals(steps, {result: layers[0]})
    if refusals:
        return replace(nothing, plan=replace(nothing.plan, refusals=tuple(refusals)))
    groups = (GroupPlan(group, (way,), way, tuple(steps), result),)
    return Rebase(Plan(tree, options, groups, (), token), found)


def _refusals(tree: ChainTree, group: Group) -> list[str]:
    image, other = tree.layers[0], tree.layers[group.onto[0]]
    if group.onto[0] == 0:
        return [f"{image.path}: cannot back on itself; name another image with --onto"]
    if 0 in group.onto:
        return [f"{other.path}: backs on {image.path}: the chain would loop; name another image"]
    if not isinstance(image, Qcow2Layer):
        return [f"{image.path}: is {image.format}, and has no backing file; name a qcow2 image"]
    # What a stopped one left in place speaks of nothing but that one.
    unfinished = unfinished_refusals(tree.layers, [group])
    if unfinished:
        return unfinished
    out = file_refusals(tree.layers, group)
    if other.path.is_symlink():
        # It may lead elsewhere tomorrow.
        real = os.path.realpath(other.path)
        out.append(f"{other.path}: is a symbolic link; name {real} itself")
    for index in dict.fromkeys((*group.line[1:], *group.onto)):
        path, header = tree.layers[index].path, tree.layers[index].header
        if header is not None and header.corrupt:
            out.append(f"{path}: is marked corrupt; see 'qemu-img check'")
        if header is not None and header.encryption:
            out.append(f"{path}: is encrypted ({header.encryption}); rebasing is not supported")
    return out


def _already(layers: tuple[Layer, ...], group: Group, steps: list[Step]) -> bool:
    """Whether the header says already what `steps` would write into it."""
    backing, step = layers[0].backing, steps[0]
    assert isinstance(step, Command)
    if backing is None or group.onto[0] not in group.line[1:2]:
        return False
    name, fmt = (step.argv[step.argv.index(option) + 1] for option in ("-b", "-F"))
    return (backing.name, backing.format) == (name, fmt)


def _candidate(image: Layer, old: list[Layer], found: Comparison) -> Candidate:
    """The figures of the only way there is: what differs is pulled."""
    assert isinstance(image, Qcow2Layer)
    grown = _growth(image, found)
    moved = found.compared_bytes
    return Candidate(
        "pull", "qemu-img", 0,
        read_bytes=2 * moved, write_bytes=found.different_bytes, extents=len(found.ranges),
        target_growth_bytes=grown, peak_extra_bytes=grown,
        traffic=Traffic(pull_bytes=moved, pull_read_bytes=2 * moved),
    )  # fmt: skip


def _growth(image: Qcow2Layer, found: Comparison) -> int:
    """At most so many bytes come to the file, refcount blocks and a larger table included."""
    header = image.header
    assert header is not None
    clusters = 0 if found.identical else _clusters(image, found)
    if not clusters:
        return 0
    blocks = 1 + clusters // (image.cluster_size * 8 // header.refcount_bits - 1)
    table = header.refcount_table_clusters * 3 // 2 + 1
    return (clusters + blocks + table) * image.cluster_size


def _clusters(image: Qcow2Layer, found: Comparison) -> int:
    """At most so many clusters of the image are new: those that differ, and L2 tables."""
    size, span = image.cluster_size, image.cluster_size * image.tables.per_table
    if len(found.ranges) >= MAX_RANGES:
        # Not all are told: as if everything that was compared differed.
        return -(-found.compared_bytes // size) + -(-image.size // span)
    count = tables = 0
    ranges = np.array(found.ranges, np.int64).reshape(-1, 2)
    starts, ends = ranges[:, 0], ranges[:, 0] + ranges[:, 1]
    for unit in (size, span):
        low, high = starts // unit, -(-ends // unit)
        # A piece in which one range ends and the next begins counts once.
        shared = int(np.count_nonzero(low[1:] < high[:-1]))
        count, tables = tables, int((high - low).sum()) - shared
    return count + tables
