"""One sentence a person believes: why this way of merging a group, and not another."""

from __future__ import annotations

from collections.abc import Sequence

from qchain.chain.layer import Layer
from qchain.plan.candidates import Candidate, rank
from qchain.plan.choice import GroupPlan

__all__ = ["reason"]

_NAMED = 3  # other ways that are named


def _human(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def _way(layers: Sequence[Layer], candidate: Candidate) -> str:
    """The candidate as the subject of a sentence."""
    if candidate.target is None:
        return "copying into a new file"
    name = layers[candidate.target].path.name
    verbs = {"pull": "pulling into", "commit": "committing into", "both": "merging into"}
    return f"{verbs[candidate.strategy]} {name}"


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole
    if 0 < share < 1:
        return "less than 1 %"
    return "nearly all" if 99 < share < 100 else f"{share:.0f} %"


def _overlap(layers: Sequence[Layer], plan: GroupPlan) -> str:
    """What the layers allocate that decides: who hides how much of whom, or who shows most."""
    counted = {c.target: c.traffic for c in plan.candidates if c.target is not None}
    members = plan.group.members
    total = sum(counted[index].shown_bytes for index in members)
    if not total:
        return ""
    if len(members) == 2:
        upper, lower = (layers[index].path.name for index in members)
        below = counted[members[1]]
        if not below.held_bytes:
            return f"{lower} holds nothing"
        hidden = below.held_bytes - below.shown_bytes
        return f"{upper} overwrites {_share(hidden, below.held_bytes)} of {lower}"
    most = max(members, key=lambda index: counted[index].shown_bytes)
    share = _share(counted[most].shown_bytes, total)
    return f"{layers[most].path.name} holds {share} of what the {len(members)} images show"


def reason(layers: Sequence[Layer], plan: GroupPlan, prefer: str = "time") -> str:
    """One sentence: why this candidate, with the numbers that decided.

    `prefer`: which figure was to decide (`MergeOptions.prefer`).
    """
    chosen = plan.chosen
    if chosen is None:
        return "no way is possible"
    others = [c for c in plan.candidates if c.feasible and c is not chosen]
    overlap = _overlap(layers, plan)
    lead = f"{overlap}; " if overlap else ""
    moved = f"{_way(layers, chosen)} moves {_human(chosen.write_bytes)}"
    if not others:
        asked = any((c.reason or "").endswith("was asked for") for c in plan.candidates)
        return f"{lead}{moved}, and is the only way {'asked for' if asked else 'possible'}"
    others.sort(key=lambda c: rank(c, prefer))
    size, verb, of = (
        (_peak, "needs", " of extra space") if prefer == "space" else (_moved, "moves", "")
    )
    amount = f"{_human(size(chosen))}{of}"
    equal = [c for c in others if size(c) == size(chosen)]
    if not equal and size(chosen) < min(size(c) for c in others):
        told = [f"{_way(layers, c)} {_human(size(c))}" for c in others[:_NAMED]]
        return f"{lead}{_way(layers, chosen)} {verb} {amount}, {', '.join(told)}"
    if prefer != "time":
        # Among equals the time decides.
        lead, others = f"{lead}no way {verb} less than {amount}; ", equal
    # Reading, commands and many small requests take time too.
    said = f"{_way(layers, chosen)} takes an estimated {chosen.seconds:.2g} s"
    told = [
        f"{_way(layers, c)} {c.seconds:.2g} s for {_human(c.write_bytes)}" for c in others[:_NAMED]
    ]
    return f"{lead}{said} for {_human(chosen.write_bytes)}, {', '.join(told)}"


def _moved(candidate: Candidate) -> int:
    return candidate.write_bytes


def _peak(candidate: Candidate) -> int:
    return candidate.peak_extra_bytes
