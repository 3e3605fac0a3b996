"""Who inherits what several kept images share: the cheapest way to merge a tree.

base <- d1 <- d2 <- x*     Each dropped image has one heir, the last of the kept images
         \\     \\<- y*     above it to be merged: only then may it be written to, and
          \\<- z*          go away. The others pull what they need of it, and it stays.

To merge x, y and z in some order means that each gets a stretch of its line, from itself
down: the stretches of all cover every dropped image once. The best target of a stretch is
known (`cost`); the best stretches follow from the bottom of the tree by adding up, since
what hangs on different overlays of an image is independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qchain.chain.chain_tree import ChainTree
from qchain.plan.selection import Group

__all__ = ["Assigned", "Cost", "assign"]

Cost = tuple[float, ...]
"""Compared in order, added part by part; infinite parts for what is impossible."""


@dataclass(frozen=True, slots=True)
class Assigned:
    """A group with what is its own, and the group (by number) that may only come after it."""

    group: Group
    before: int | None = None


@dataclass(slots=True)
class _Way:
    """To let `heir` (the number of a group) have all from itself down to some image.

    `rest`: what the other groups above that image cost. `chosen`: the ways of the side
    branches, found where they join.
    """

    heir: int
    rest: Cost
    sides: tuple[_Way, ...] = ()
    length: int = 1


def _plus(a: Cost, b: Cost) -> Cost:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def assign(
    tree: ChainTree, groups: Sequence[Group], cost: Callable[[int, int], Cost]
) -> list[Assigned]:
    """Give every dropped image to one group, so that the costs of all groups are least.

    Args:
        groups: as `groups_of` gave them, every member its own.
        cost: (number of a group, how many of its members are its own) -> its least cost.

    Returns: the groups in the order given.
    """
    of_kept = {group.kept: number for number, group in enumerate(groups)}
    dropped = {index for group in groups for index in group.dropped}
    known: dict[tuple[int, int], Cost] = {}

    def priced(way: _Way) -> Cost:
        key = (way.heir, way.length)
        if key not in known:
            known[key] = cost(*key)
        return _plus(way.rest, known[key])

    zero: Cost = (0.0,) * len(cost(0, groups[0].count)) if groups else ()
    own = [1] * len(groups)
    before: list[int | None] = [None] * len(groups)
    ways: dict[int, list[_Way]] = {}
    for index in tree.from_above():
        if index in of_kept:
            ways[index] = [_Way(of_kept[index], zero)]
        elif index in dropped:
            ways[index] = _joined([ways.pop(above) for above in tree.overlays[index]], zero, priced)
            if tree.below[index] not in dropped:
                best = min(ways.pop(index), key=priced)
                _settle(best, own, before)
    return [
        Assigned(replace(group, own=count), after)
        for group, count, after in zip(groups, own, before, strict=True)
    ]


def _joined(branches: list[list[_Way]], zero: Cost, priced: Callable[[_Way], Cost]) -> list[_Way]:
    """The ways through an image on which all of `branches` back."""
    if len(branches) == 1:
        for way in branches[0]:
            way.length += 1
        return branches[0]
    best = [min(branch, key=priced) for branch in branches]
    costs = [priced(way) for way in best]
    out: list[_Way] = []
    for number, branch in enumerate(branches):
        others = zero
        for other, each in enumerate(costs):
            if other != number:
                others = _plus(others, each)
        sides = tuple(way for other, way in enumerate(best) if other != number)
        # A side branch ends here; whoever goes on takes this image along.
        copies = tuple(replace(way) for way in sides)
        for way in branch:
            out.append(
                _Way(way.heir, _plus(way.rest, others), (*way.sides, *copies), way.length + 1)
            )
    return out


def _settle(best: _Way, own: list[int], before: list[int | None]) -> None:
    todo: list[tuple[_Way, int | None]] = [(best, None)]
    while todo:
        way, after = todo.pop()
        own[way.heir], before[way.heir] = way.length, after
        todo += [(side, way.heir) for side in way.sides]
