"""Which points of a tree to drop, and the groups that follow from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qchain.chain.chain_tree import ChainTree
from qchain.chain.layer import Layer
from qchain.errors import UsageError

__all__ = ["Group", "Request", "find_layer", "find_layers", "groups_of", "select"]


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
    """A kept image and the dropped ones directly below it, as indices of layers of a tree.

    x <- d2 <- d1 <- base   line of x: x d2 d1 base, count 3; of y: y d1 base, count 2.
    y <------- /            x first: own 2 (d1 stays, y needs it), then y: own 2 (the heir).

    Attributes:
        line: from the kept image down to the end of the chain.
        count: how many of the line are merged: the kept image and the dropped ones.
        own: how many of these nobody else needs any more when it is this group's turn.
            Only they may be written to, and go away; the other ones are read.
        onto: the chain that the kept image is led to, where that is not what follows in
            the line (`qchain.plan.rebase`): the new backing, and what lies below it.
    """

    line: tuple[int, ...]
    count: int
    own: int
    onto: tuple[int, ...] = ()

    @property
    def kept(self) -> int:
        return self.line[0]

    @property
    def members(self) -> tuple[int, ...]:
        """The kept image, and all dropped ones."""
        return self.line[: self.count]

    @property
    def owned(self) -> tuple[int, ...]:
        """The kept image, and the dropped ones that go away with it."""
        return self.line[: self.own]

    @property
    def dropped(self) -> tuple[int, ...]:
        return self.line[1 : self.count]

    @property
    def shared(self) -> tuple[int, ...]:
        """The dropped ones that other kept images still need."""
        return self.line[self.own : self.count]

    @property
    def below(self) -> int | None:
        """The new backing, None at the end of the chain."""
        if self.onto:
            return self.onto[0]
        return self.line[self.count] if self.count < len(self.line) else None

    @property
    def under(self) -> tuple[int, ...]:
        """The new backing and what lies below it."""
        return self.onto or self.line[self.count :]


def find_layer(name: str, layers: Sequence[Layer]) -> int:
    """The layer that `name` means. Raises `UsageError` when none or several do."""
    return find_layers([name], [layer.path for layer in layers])[0]


def find_layers(names: Sequence[str], paths: Sequence[Path]) -> list[int]:
    """The layers, at these `paths`, that the names mean.

    Raises: `UsageError` when none or several do.
    """
    by_path: dict[str, list[int]] = {}
    by_name: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        by_path.setdefault(os.path.realpath(path), []).append(index)
        by_name.setdefault(path.name, []).append(index)
    out = []
    for name in names:
        found = by_path.get(os.path.realpath(name), []) if os.path.lexists(name) else []
        if len(found) != 1:
            found = by_name.get(name, [])
        if len(found) > 1:
            why = "more than one image of the chain has this name"
            raise UsageError(name, why, "give its path")
        if not found:
            known = ", ".join(path.name for path in paths[:8])
            more = ", ..." if len(paths) > 8 else ""
            raise UsageError(name, "is not in the chain", f"the chain is: {known}{more}")
        out.append(found[0])
    return out


def select(request: Request, tree: ChainTree) -> frozenset[int]:
    """The indices of the points to drop.

    Raises: `UsageError` when the request is contradictory, empty, or names an image
        that is not in the tree.
    """
    ways = [bool(request.drop), bool(request.keep), request.flatten, request.collapse]
    if sum(ways) != 1:
        raise UsageError(
            "plan", "needs exactly one of --drop, --keep, --flatten, --collapse", "choose one"
        )
    layers = tree.layers
    paths = [layer.path for layer in layers]
    inner = frozenset(range(len(layers))) - frozenset(tree.actives)
    if request.flatten:
        return inner
    if request.collapse:
        return frozenset(index for index in inner if tree.below[index] is not None)
    if request.keep:
        return inner.difference(find_layers(request.keep, paths))
    dropped = frozenset(find_layers(request.drop, paths))
    for active in sorted(dropped - inner):
        raise UsageError(
            layers[active].path,
            "the active point cannot be dropped by a merge: nothing above keeps its content",
            "to go back to an older point, delete the active image itself",
        )
    return dropped


def groups_of(dropped: frozenset[int], tree: ChainTree) -> list[Group]:
    """A group for each kept image that backs on a dropped one, upper ones first.

    All of each group's members are its own here; `qchain.plan.heirs` says whose they are.
    """
    groups: list[Group] = []
    for index in tree.from_above():
        below = tree.below[index]
        if index in dropped or below is None or below not in dropped:
            continue
        line = tree.line(index)
        count = 1
        while count < len(line) and line[count] in dropped:
            count += 1
        groups.append(Group(line, count, count))
    return groups
