"""A plan: the groups of a request, the choice for each, and the steps in order."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qchain.chain.chain import Chain
from qchain.chain.chain_tree import ChainTree, tree_of
from qchain.chain.layer import Layer
from qchain.chain.scan import unfinished_of
from qchain.errors import Refused, UsageError
from qchain.plan.bitmaps import bitmap_refusals, fate_of
from qchain.plan.candidates import Candidate
from qchain.plan.choice import GroupPlan, choices, impossible, space_of
from qchain.plan.links import link_directories, seen_from, stand_for_links
from qchain.plan.model import DEFAULT, TimeModel
from qchain.plan.naming import naming_refusals
from qchain.plan.options import MergeOptions
from qchain.plan.reasons import reason
from qchain.plan.refusals import (
    above_refusals,
    file_refusals,
    overlay_refusals,
    scanned,
    space_refusals,
    unfinished_refusals,
)
from qchain.plan.selection import Group, Request, groups_of, select
from qchain.plan.sequence import Above, sequence
from qchain.plan.sequence_copy import copy_sequence
from qchain.plan.space import Change, peaks
from qchain.plan.steps import Adopt, Step, as_json
from qchain.plan.versions import Version, behaviour_of

__all__ = ["GroupPlan", "Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What a merge would do to a chain, and why. `refusals`: why it would do nothing."""

    tree: ChainTree
    options: MergeOptions
    groups: tuple[GroupPlan, ...]
    refusals: tuple[str, ...]
    token: str = ""
    """Part of the journal's name."""
    model: TimeModel = DEFAULT
    request: Request = field(default_factory=Request)
    """What was asked for, so that the plan can be made again."""
    links: Mapping[Path, Path] = field(default_factory=dict)
    """By the names of files: the links by which the chain knows them."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.tree.layers

    @property
    def steps(self) -> list[Step]:
        return [step for group in self.groups for step in group.steps]

    @property
    def scanned(self) -> list[str]:
        """The absolute names of the directories in which overlays were looked for, each once."""
        found = scanned(self.layers, [plan.group for plan in self.groups], self.options)
        return list(dict.fromkeys(os.path.abspath(path) for path in found))

    def path(self, index: int | None) -> str | None:
        """The absolute name of a layer, as the chain knows it."""
        if index is None:
            return None
        path = self.layers[index].path
        return os.path.abspath(self.links.get(path, path))

    def as_json(self, program: str = "qemu-img") -> dict[str, object]:
        """The plan with the field names that outside scripts rely on."""
        return {
            "active": [self.path(index) for index in self.tree.actives],
            "groups": [self._group_json(group) for group in self.groups],
            "seconds_from": self.model.source,
            "scanned": self.scanned,
            "steps": [as_json(step, program) for step in self.steps],
            "refusals": list(self.refusals),
        }

    def _group_json(self, plan: GroupPlan) -> dict[str, object]:
        chosen = plan.chosen
        return {
            "kept": self.path(plan.group.kept),
            "dropped": [self.path(index) for index in plan.group.dropped],
            "shared": [self.path(index) for index in plan.group.shared],
            "new_backing": self.path(plan.group.below),
            "chosen": None if chosen is None else chosen.strategy,
            "engine": None if chosen is None else chosen.engine,
            "target": None if chosen is None else self.path(chosen.target),
            "result": None if plan.result is None else str(plan.result),
            "why": reason(self.layers, plan, self.options.prefer),
            "bitmaps": plan.bitmaps.as_json(self.options.bitmaps),
            "candidates": [
                {
                    "strategy": candidate.strategy,
                    "engine": candidate.engine,
                    "target": self.path(candidate.target),
                    "feasible": candidate.feasible,
                    "reason": candidate.reason,
                    "read_bytes": candidate.read_bytes,
                    "write_bytes": candidate.write_bytes,
                    "extents": candidate.extents,
                    "target_growth_bytes": candidate.target_growth_bytes,
                    **_clusters_json(candidate),
                    "peak_extra_bytes": candidate.peak_extra_bytes,
                    "freed_bytes": candidate.freed_bytes,
                    "seconds": candidate.seconds,
                    "risk": candidate.risk,
                    "exact": candidate.exact,
                }
                for candidate in plan.candidates
            ],
        }


def _clusters_json(candidate: Candidate) -> dict[str, object]:
    """How many more clusters the target uses; "exact": not only at most."""
    growth = candidate.growth
    if growth is None:
        return {"target_clusters_added": 0, "target_growth_exact": False}
    return {"target_clusters_added": growth.clusters, "target_growth_exact": growth.exact}


def make_plan(
    chain: Chain | ChainTree,
    request: Request,
    options: MergeOptions | None = None,
    model: TimeModel = DEFAULT,
    progress: Callable[[int, int], None] | None = None,
    version: Version | None = None,
    token: str | None = None,
) -> Plan:
    """Plan the merge that drops the requested points of `chain`.

    Args:
        version: of the qemu-img that will do the work; what is not known is taken for 7.2.
        token: for the journal's name, where the merge is a part of something larger.

    Raises: `UsageError` for a request that makes no sense, with `options.exact` also
        `ImageError` when contents cannot be read. What speaks against the merge is in
        `refusals`; with any refusal there are no steps.
    """
    options = options or MergeOptions()
    tree = tree_of(chain)
    layers = tree.layers
    try:
        dropped = select(request, tree)
    except UsageError:
        # A name that is not there any more may be the doing of a merge that was stopped.
        for journal in unfinished_of(layer.path for layer in layers):
            todo = f"'qchain recover {journal.parent}' first"
            raise Refused(journal, "a merge of this chain is not finished", todo) from None
        raise
    bare = groups_of(dropped, tree)
    # What stays what it is keeps the name by which it is known.
    changed = {index for group in bare for index in group.members}
    changed |= {above for group in bare for above in tree.overlays[group.kept]}
    links = stand_for_links(layers[index] for index in sorted(changed))
    looked_in = (*options.scan, *link_directories(links.values()))
    options = replace(options, scan=tuple(dict.fromkeys(looked_in)))
    unfinished = unfinished_refusals(layers, bare, token or "")
    chosen = choices(tree, bare, options, model, progress, behaviour_of(version))
    refusals = _refusals(tree, chosen, options)
    # What a stopped merge left in place speaks of nothing but that merge.
    refusals = unfinished or refusals
    plans: list[GroupPlan] = []
    token = token or secrets.token_hex(3)
    results: dict[int, list[Above]] = {}
    files = {layer.path.absolute(): layer for layer in layers}
    files |= {Path(os.path.abspath(layer.path)): layer for layer in layers}
    narrow: list[str] = []
    for plan in chosen:
        group = plan.group
        if not refusals and plan.chosen is not None:
            above = [*results.get(group.kept, ()), *_kept_above(tree, group, dropped, links)]
            elsewhere = seen_from(tree, group.members, links)
            # Not to be told from the journal's name, which all can see before the work begins.
            secret = secrets.token_hex(8)
            copies = plan.chosen.target is None
            fate = fate_of(layers, group, plan.chosen.target, options)
            if copies:
                steps, result = copy_sequence(
                    layers, group, plan.chosen, options, secret, above, elsewhere
                )
            else:
                steps, result = sequence(
                    layers, group, plan.chosen, options, secret, above, fate, elsewhere
                )
            # A new file is as the kept image is.
            like = layers[group.kept if plan.chosen.target is None else plan.chosen.target]
            if group.below is not None:
                made = Above(result, like.format, _relative(layers, group) and not elsewhere)
                results.setdefault(group.below, []).append(made)
            files |= {step.image: like for step in steps if isinstance(step, Adopt)}
            narrow += naming_refusals(steps, files)
            files[result] = like
            plan = replace(plan, steps=tuple(steps), result=result, bitmaps=fate)
        plans.append(plan)
    if narrow:
        refusals += narrow
        plans = [replace(plan, steps=(), result=None) for plan in plans]
    lines = tuple(dict.fromkeys(refusals))
    return Plan(tree, options, tuple(plans), lines, token, model, request, links)


def _refusals(tree: ChainTree, plans: Sequence[GroupPlan], options: MergeOptions) -> list[str]:
    """What speaks against the merge."""
    layers = tree.layers
    out = [line for plan in plans for line in file_refusals(layers, plan.group)]
    out += [line for plan in plans for line in bitmap_refusals(layers, plan.group, options)]
    out += overlay_refusals(layers, [plan.group for plan in plans], options)
    changes: list[Change] = []
    for plan in plans:
        chosen = plan.chosen
        if chosen is None:
            out.append(impossible(layers, plan, options))
        else:
            changes += space_of(layers, plan, options)
            target = plan.group.kept if chosen.target is None else chosen.target
            out += above_refusals(tree, plan.group, target, options)
    directories = (layers[index].path.parent for plan in plans for index in plan.group.members)
    return out + space_refusals(peaks(changes), directories)


def _relative(layers: Sequence[Layer], group: Group) -> bool:
    """Whether the group's result names its backing file by a relative name."""
    backing = layers[group.members[-1]].backing
    return backing is not None and not backing.name.startswith("/")


def _kept_above(
    tree: ChainTree, group: Group, dropped: frozenset[int], links: Mapping[Path, Path]
) -> list[Above]:
    """The kept images that back on the group's kept image, and name it as they always did."""
    out = []
    for index in tree.overlays[group.kept]:
        overlay = tree.layers[index]
        if index not in dropped:
            assert overlay.backing is not None
            relative = not overlay.backing.name.startswith("/")
            relative = relative and not seen_from(tree, [index], links)
            out.append(Above(Path(os.path.abspath(overlay.path)), overlay.format, relative))
    return out
