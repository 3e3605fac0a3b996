"""Which points of a chain to drop, and the groups that follow from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from qchain.chain.layer import Layer
from qchain.errors import UsageError

__all__ = ["Group", "Request", "find_layer", "groups_of", "select"]


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for: exactly one of the four ways.

    `drop` and `keep` are names: a path, or a file name unique in the chain.
    """

    drop: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    flatten: bool = False
    collapse: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """A kept image and the dropped ones directly below it, as layer indices (0 = active).

    `members`: the kept image first, then the dropped ones downwards. `below`: the new
    backing, None at the end of the chain.
    """

    members: tuple[int, ...]
    below: int | None

    @property
    def kept(self) -> int:
        return self.members[0]

    @property
    def dropped(self) -> tuple[int, ...]:
        return self.members[1:]


def find_layer(name: str, layers: Sequence[Layer]) -> int:
    """The layer that `name` means. Raises `UsageError` when none or several do."""
    by_path = [
        index
        for index, layer in enumerate(layers)
        if os.path.realpath(layer.path) == os.path.realpath(name) and os.path.lexists(name)
    ]
    if len(by_path) == 1:
        return by_path[0]
    by_name = [index for index, layer in enumerate(layers) if layer.path.name == name]
    if len(by_name) == 1:
        return by_name[0]
    if by_name:
        raise UsageError(name, "more than one image of the chain has this name", "give its path")
    known = ", ".join(layer.path.name for layer in layers[:8])
    more = ", ..." if len(layers) > 8 else ""
    raise UsageError(name, "is not in the chain", f"the chain is: {known}{more}")


def select(request: Request, layers: Sequence[Layer]) -> frozenset[int]:
    """The indices of the points to drop (layers active first).

    Raises: `UsageError` when the request is contradictory, empty, or names an image
        that is not in the chain.
    """
    ways = [bool(request.drop), bool(request.keep), request.flatten, request.collapse]
    if sum(ways) != 1:
        raise UsageError(
            "plan", "needs exactly one of --drop, --keep, --flatten, --collapse", "choose one"
        )
    last = len(layers) - 1
    if request.flatten:
        dropped = frozenset(range(1, last + 1))
    elif request.collapse:
        dropped = frozenset(range(1, last))
    elif request.keep:
        kept = {find_layer(name, layers) for name in request.keep}
        dropped = frozenset(range(1, last + 1)) - kept
    else:
        dropped = frozenset(find_layer(name, layers) for name in request.drop)
    if 0 in dropped:
        raise UsageError(
            layers[0].path,
            "the active point cannot be dropped by a merge: nothing above keeps its content",
            "to go back to an older point, delete the active image itself",
        )
    return dropped


def groups_of(dropped: frozenset[int], depth: int) -> list[Group]:
    """The groups, from the top of the chain down; images that nothing happens to are in none."""
    groups: list[Group] = []
    index = 0
    while index < depth:
        end = index + 1
        while end < depth and end in dropped:
            end += 1
        if end > index + 1:
            groups.append(Group(tuple(range(index, end)), end if end < depth else None))
        index = end
    return groups
