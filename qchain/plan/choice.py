"""Which way for each group: heirs, targets and the order, all weighed together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qchain.chain.chain_tree import ChainTree
from qchain.chain.layer import Layer
from qchain.plan.bitmaps import NOTHING, Fate
from qchain.plan.candidates import Candidate, candidates_of, choose, figures_of, rank
from qchain.plan.heirs import Assigned, Cost, assign
from qchain.plan.model import TimeModel
from qchain.plan.options import MergeOptions
from qchain.plan.order import Job, least_peak_order
from qchain.plan.selection import Group
from qchain.plan.space import Change, append_changes, changes_of, copy_changes, peaks
from qchain.plan.steps import Step
from qchain.plan.versions import Behaviour
from qchain.verify.manifest import manifest_bytes

__all__ = ["GroupPlan", "choices", "impossible", "space_of"]


@dataclass(frozen=True)
class GroupPlan:
    """One group: every candidate, the chosen one (None: none is possible), its steps."""

    group: Group
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    steps: tuple[Step, ...]
    result: Path | None
    bitmaps: Fate = NOTHING


def choices(
    tree: ChainTree,
    bare: Sequence[Group],
    options: MergeOptions,
    model: TimeModel,
    progress: Callable[[int, int], None] | None,
    behaviour: Behaviour,
) -> list[GroupPlan]:
    """The groups with their candidates and choices, in the order in which they are merged.

    Args:
        bare: as `groups_of` gives them.
    """
    figures = [
        figures_of(tree.layers, group, model, progress, options=options, behaviour=behaviour)
        for group in bare
    ]

    def candidates(number: int, own: int) -> list[Candidate]:
        return candidates_of(tree, replace(bare[number], own=own), figures[number], options)

    def cost(number: int, own: int) -> Cost:
        best = choose(candidates(number, own), options.prefer)
        if best is None:
            return (math.inf,) * 3
        # Whole milliseconds: sums of them are exact.
        return tuple(round(part * 1000) for part in rank(best, options.prefer))

    plans = []
    assigned = assign(tree, bare, cost)
    for number, each in enumerate(assigned):
        found = candidates(number, each.group.own)
        plans.append(GroupPlan(each.group, tuple(found), choose(found, options.prefer), (), None))
    order = least_peak_order(_jobs(tree, plans, assigned, options))
    return [plans[number] for number in order]


def space_of(layers: Sequence[Layer], plan: GroupPlan, options: MergeOptions) -> list[Change]:
    """What the chosen way of a group takes of the filesystems, and gives back, in order."""
    chosen, group = plan.chosen, plan.group
    if chosen is None:
        return []
    if chosen.target is None:
        changes = copy_changes(layers, group, chosen.target_growth_bytes, options.keep_files)
    elif chosen.growth is not None and chosen.engine == "native":
        changes = append_changes(layers, group, chosen.target, chosen.growth, options.keep_files)
    else:
        assert chosen.growth is not None
        changes = changes_of(layers, group, chosen.target, chosen.growth, options.keep_files)
    if options.verify == "manifest":
        digests = manifest_bytes(layers[group.kept].size)
        changes = [replace(changes[0], amount=digests), *changes]
        if not options.keep_files:
            changes.append(replace(changes[0], amount=-digests))
    return changes


def _jobs(
    tree: ChainTree,
    plans: Sequence[GroupPlan],
    assigned: Sequence[Assigned],
    options: MergeOptions,
) -> list[Job]:
    """What each group takes and gives on the filesystem that has most to give."""
    of_kept = {plan.group.kept: number for number, plan in enumerate(plans)}
    spaces = [space_of(tree.layers, plan, options) for plan in plans]
    needs: dict[int, int] = {}
    for changes in spaces:
        for device, most in peaks(changes).items():
            needs[device] = needs.get(device, 0) + most
    tightest = max(needs, key=lambda device: needs[device], default=-1)
    jobs = []
    for plan, each, changes in zip(plans, assigned, spaces, strict=True):
        before = each.before
        if before is None:
            # Upper groups come first: the lower one's files are what they read through.
            before = next((of_kept[i] for i in plan.group.under if i in of_kept), None)
        net = sum(change.amount for change in changes if change.device == tightest)
        jobs.append(Job(max(peaks(changes).get(tightest, 0), net), net, before))
    return jobs


_ASKED = ("--strategy ", "--engine ")


def impossible(layers: Sequence[Layer], plan: GroupPlan, options: MergeOptions) -> str:
    """The refusal of a group for which no way is possible."""
    others = [c for c in plan.candidates if not (c.reason or "").startswith(_ASKED)]
    told = [c for c in others if c.strategy == options.strategy] or others
    kept = layers[plan.group.kept].path
    if not told:
        return f"{kept}: no target for --strategy {options.strategy} in this group; use auto"
    return f"{kept}: cannot be merged this way: {told[0].reason}"
