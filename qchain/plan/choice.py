"""Which way for each group: heirs, targets and the order, all weighed together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qchain.chain.chain_tree import ChainTree
from qchain.chain.layer import Layer
from qchain.plan.candidates import Candidate, candidates_of, choose, figures_of, rank
from qchain.plan.heirs import Assigned, Cost, assign
from qchain.plan.model import TimeModel
from qchain.plan.options import MergeOptions
from qchain.plan.order import Job, least_peak_order
from qchain.plan.selection import Group
from qchain.plan.steps import Step

__all__ = ["GroupPlan", "choices", "impossible"]


@dataclass(frozen=True)
class GroupPlan:
    """One group: every candidate, the chosen one (None: none is possible), its steps."""

    group: Group
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    steps: tuple[Step, ...]
    result: Path | None


def choices(
    tree: ChainTree,
    bare: Sequence[Group],
    options: MergeOptions,
    model: TimeModel,
    progress: Callable[[int, int], None] | None,
) -> list[GroupPlan]:
    """The groups with their candidates and choices, in the order in which they are merged.

    Args:
        bare: as `groups_of` gives them.
    """
    figures = [figures_of(tree.layers, group, model, progress) for group in bare]

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
    order = least_peak_order(_jobs(tree, plans, assigned))
    return [plans[number] for number in order]


def _jobs(tree: ChainTree, plans: Sequence[GroupPlan], assigned: Sequence[Assigned]) -> list[Job]:
    """What each group takes and gives on the filesystem that has most to take."""
    of_kept = {plan.group.kept: number for number, plan in enumerate(plans)}
    devices = [layer.file.id.device for layer in tree.layers]
    needs: dict[int, int] = {}
    for plan in plans:
        if plan.chosen is not None and plan.chosen.target is not None:
            device = devices[plan.chosen.target]
            needs[device] = needs.get(device, 0) + plan.chosen.peak_extra_bytes
    tightest = max(needs, key=lambda device: needs[device], default=None)
    jobs = []
    for plan, each in zip(plans, assigned, strict=True):
        before = each.before
        if before is None:
            # Upper groups come first: the lower one's files are what they read through.
            before = next((of_kept[i] for i in plan.group.under if i in of_kept), None)
        peak = grown = freed = 0
        target = None if plan.chosen is None else plan.chosen.target
        if plan.chosen is not None and target is not None:
            if devices[target] == tightest:
                peak, grown = plan.chosen.peak_extra_bytes, plan.chosen.target_growth_bytes
            if plan.chosen.freed_bytes:
                freed = sum(
                    tree.layers[index].file.disk_size
                    for index in plan.group.owned
                    if index != target and devices[index] == tightest
                )
        jobs.append(Job(peak, grown - freed, before))
    return jobs


def impossible(layers: Sequence[Layer], plan: GroupPlan, options: MergeOptions) -> str:
    """The refusal of a group for which no way is possible."""
    asked = f"--strategy {options.strategy} was asked for"
    others = [c for c in plan.candidates if c.reason != asked and c.target is not None]
    told = [c for c in others if c.strategy == options.strategy] or others
    kept = layers[plan.group.kept].path
    if not told:
        return f"{kept}: no target for --strategy {options.strategy} in this group; use auto"
    return f"{kept}: cannot be merged this way: {told[0].reason}"
