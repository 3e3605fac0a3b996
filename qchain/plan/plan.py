"""A plan: the groups of a request, their candidates, the choice, and the steps in order."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qchain.chain.chain import Chain
from qchain.chain.layer import Layer
from qchain.plan.candidates import Candidate, candidates_of, choose
from qchain.plan.model import DEFAULT, TimeModel
from qchain.plan.naming import naming_refusals
from qchain.plan.options import MergeOptions
from qchain.plan.refusals import (
    above_refusals,
    file_refusals,
    overlay_refusals,
    space_refusals,
    unfinished_refusals,
)
from qchain.plan.selection import Group, Request, groups_of, select
from qchain.plan.sequence import Above, sequence
from qchain.plan.steps import Step, as_json
from qchain.plan.versions import Version, behaviour_of

__all__ = ["GroupPlan", "Plan", "make_plan"]


@dataclass(frozen=True)
class GroupPlan:
    """One group: every candidate, the chosen one (None: none is possible), its steps."""

    group: Group
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    steps: tuple[Step, ...]
    result: Path | None


@dataclass(frozen=True)
class Plan:
    """What a merge would do to a chain, and why. `refusals`: why it would do nothing."""

    layers: tuple[Layer, ...]
    options: MergeOptions
    groups: tuple[GroupPlan, ...]
    refusals: tuple[str, ...]
    token: str = ""
    """Part of the journal's name."""

    @property
    def steps(self) -> list[Step]:
        return [step for group in self.groups for step in group.steps]

    def path(self, index: int | None) -> str | None:
        """The absolute name of a layer."""
        return None if index is None else os.path.abspath(self.layers[index].path)

    def as_json(self, program: str = "qemu-img") -> dict[str, object]:
        """The plan with the field names that outside scripts rely on."""
        return {
            "active": [self.path(0)],
            "groups": [self._group_json(group) for group in self.groups],
            "steps": [as_json(step, program) for step in self.steps],
            "refusals": list(self.refusals),
        }

    def _group_json(self, plan: GroupPlan) -> dict[str, object]:
        chosen = plan.chosen
        return {
            "kept": self.path(plan.group.kept),
            "dropped": [self.path(index) for index in plan.group.dropped],
            "new_backing": self.path(plan.group.below),
            "chosen": None if chosen is None else chosen.strategy,
            "engine": None if chosen is None else chosen.engine,
            "target": None if chosen is None else self.path(chosen.target),
            "result": None if plan.result is None else str(plan.result),
            "why": reason(self.layers, plan),
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
                    "peak_extra_bytes": candidate.peak_extra_bytes,
                    "freed_bytes": candidate.freed_bytes,
                    "seconds": candidate.seconds,
                    "exact": candidate.exact,
                }
                for candidate in plan.candidates
            ],
        }


def _human(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def reason(layers: Sequence[Layer], plan: GroupPlan) -> str:
    """One sentence: why this candidate, with the numbers that decided."""
    chosen = plan.chosen
    if chosen is None or chosen.target is None:
        return "no way is possible"
    moved = chosen.write_bytes
    name = layers[chosen.target].path.name
    said = f"{chosen.strategy} into {name} moves {_human(moved)}"
    others = [c for c in plan.candidates if c.feasible and c is not chosen]
    if not others:
        return f"{said}; it is the only way possible"
    best = min(others, key=lambda c: (c.seconds, c.write_bytes))
    assert best.target is not None
    other = layers[best.target].path.name
    return (
        f"{said} (estimated {chosen.seconds:.2g} s); {best.strategy} into {other} would move "
        f"{_human(best.write_bytes)} ({best.seconds:.2g} s)"
    )


def make_plan(
    chain: Chain,
    request: Request,
    options: MergeOptions | None = None,
    model: TimeModel = DEFAULT,
    progress: Callable[[int, int], None] | None = None,
    version: Version | None = None,
) -> Plan:
    """Plan the merge that drops the requested points of `chain`.

    Args:
        version: of the qemu-img that will do the work; what is not known is taken for 7.2.

    Raises: `UsageError` for a request that makes no sense, with `options.exact` also
        `ImageError` when contents cannot be read. What speaks against the merge is in
        `refusals`; with any refusal there are no steps.
    """
    options = options or MergeOptions()
    layers = chain.layers
    groups = groups_of(select(request, layers), len(layers))
    unfinished = unfinished_refusals(layers, groups)
    refusals: list[str] = []
    refusals += [line for group in groups for line in file_refusals(layers, group)]
    refusals += overlay_refusals(layers, groups, options)
    found: list[tuple[Group, list[Candidate], Candidate | None]] = []
    needs: list[tuple[Path, int]] = []
    for group in groups:
        candidates = candidates_of(layers, group, options, model, progress, behaviour_of(version))
        chosen = choose(candidates, options.prefer)
        if chosen is None:
            refusals.append(_impossible(layers, group, candidates, options))
        elif chosen.target is not None:
            needs.append((layers[chosen.target].path.parent, chosen.peak_extra_bytes))
            refusals += above_refusals(layers, group, chosen.target, options)
        found.append((group, candidates, chosen))
    refusals += space_refusals(needs)
    # What a stopped merge left in place speaks of nothing but that merge.
    refusals = unfinished or refusals
    plans: list[GroupPlan] = []
    token = secrets.token_hex(3)
    results: dict[int, tuple[Path, str]] = {}
    files = {layer.path.absolute(): layer for layer in layers}
    files |= {Path(os.path.abspath(layer.path)): layer for layer in layers}
    narrow: list[str] = []
    for group, candidates, chosen in found:
        steps: list[Step] = []
        result = None
        if not refusals and chosen is not None and chosen.target is not None:
            above = _above(layers, group, results)
            # Not to be told from the journal's name, which all can see before the work begins.
            secret = secrets.token_hex(8)
            steps, result = sequence(layers, group, chosen, options, secret, above)
            results[group.members[-1]] = (result, layers[chosen.target].format)
            files[result] = layers[chosen.target]
            narrow += naming_refusals(steps, files)
        plans.append(GroupPlan(group, tuple(candidates), chosen, tuple(steps), result))
    if narrow:
        refusals += narrow
        plans = [replace(plan, steps=(), result=None) for plan in plans]
    return Plan(layers, options, tuple(plans), tuple(dict.fromkeys(refusals)), token)


def _above(
    layers: Sequence[Layer], group: Group, results: dict[int, tuple[Path, str]]
) -> Above | None:
    """What backs on the kept image once the groups above it are merged."""
    index = group.kept - 1
    if index < 0:
        return None
    overlay = layers[index]
    assert overlay.backing is not None
    path, fmt = results.get(index, (Path(os.path.abspath(overlay.path)), overlay.format))
    return Above(path, fmt, not overlay.backing.name.startswith("/"))


def _impossible(
    layers: Sequence[Layer],
    group: Group,
    candidates: Sequence[Candidate],
    options: MergeOptions,
) -> str:
    asked = f"--strategy {options.strategy} was asked for"
    told = [c for c in candidates if c.strategy == options.strategy and c.reason != asked]
    told = told or [c for c in candidates if c.reason != asked and c.target is not None]
    kept = layers[group.kept].path
    if not told:
        return f"{kept}: no target for --strategy {options.strategy} in this group; use auto"
    return f"{kept}: cannot be merged this way: {told[0].reason}"
