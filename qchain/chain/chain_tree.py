"""Chains that share files: linked clones, and the single chain as the plainest tree.

base <- d1 <- d2 <- x*      below: x -> d2 -> d1 -> base, y -> d1; actives: x, y
         \\<- y*
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qchain.chain.chain import Chain, open_chain
from qchain.chain.gate import Gate
from qchain.chain.layer import Layer, close_layers
from qchain.chain.scan import identity
from qchain.errors import ImageError, UsageError
from qchain.hostfile import FileId

__all__ = ["ChainTree", "open_pair", "open_tree", "tree_of"]


@dataclass(frozen=True)
class ChainTree:
    """Images that back on each other, each file once.

    Attributes:
        layers: those of the first chain from its active image down, then what the second
            one has of its own, and so on.
        below: for each layer the index of its backing file, None for a base.
        actives: the indices of the active images.
    """

    layers: tuple[Layer, ...]
    below: tuple[int | None, ...]
    actives: tuple[int, ...]

    def line(self, index: int) -> tuple[int, ...]:
        """The chain of a layer: itself, and all below it."""
        out: list[int] = []
        at: int | None = index
        while at is not None:
            out.append(at)
            at = self.below[at]
        return tuple(out)

    @cached_property
    def overlays(self) -> tuple[tuple[int, ...], ...]:
        """For each layer, which layers back on it."""
        out: list[list[int]] = [[] for _ in self.layers]
        for index, below in enumerate(self.below):
            if below is not None:
                out[below].append(index)
        return tuple(tuple(each) for each in out)

    def from_above(self) -> list[int]:
        """All layers, each before what it backs on."""
        order = [index for index, below in enumerate(self.below) if below is None]
        for index in order:
            order.extend(reversed(self.overlays[index]))
        return order[::-1]

    def close(self) -> None:
        close_layers(self.layers)

    def __enter__(self) -> ChainTree:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tree_of(chain: Chain | ChainTree) -> ChainTree:
    """A single chain as a tree; the files stay the chain's."""
    if isinstance(chain, ChainTree):
        return chain
    count = len(chain.layers)
    return ChainTree(chain.layers, (*range(1, count), None), (0,))


def open_tree(
    actives: Sequence[Path | str], gate: Gate | None = None, fmt: str | None = None
) -> ChainTree:
    """Open several active images and all that they back on, each file once.

    Raises: what `open_chain` raises; `UsageError` for an image that is named twice, or
        that another one backs on; `ImageError` where overlays of one file record
        different formats of it. Nothing stays open then.
    """
    gate = gate or Gate()
    growing = _Growing()
    tops: list[int] = []
    try:
        for path in actives:
            first = len(growing.layers)
            chain = open_chain(Path(path), gate, fmt, known=growing.known.keys())
            top, joins = growing.add(chain)
            if top < first or joins in tops:
                raise UsageError(
                    growing.layers[top if top < first else joins].path,
                    "is named twice, or another active image backs on it",
                    "name the uppermost images only, each once; what is to go needs --drop each",
                )
            tops.append(top)
        return growing.tree(tops)
    except BaseException:
        growing.close()
        raise


def open_pair(
    image: Path,
    other: Path,
    gate: Gate | None = None,
    fmt: str | None = None,
    other_fmt: str | None = None,
) -> tuple[ChainTree, int]:
    """Open the chains of two images, each file once: the tree, and the index of `other`.

    `image` is the first layer, and the only active one. `other` may be in its chain, or
    back on it.

    Args:
        other_fmt: the format of `other`; by default what the chain of `image` records, or
            else its magic.

    Raises: what `open_chain` raises; `ImageError` where overlays of one file record
        different formats of it. Nothing stays open then.
    """
    gate = gate or Gate()
    growing = _Growing()
    try:
        growing.add(open_chain(image, gate, fmt))
        place = identity(other)
        if other_fmt is None and place in growing.known:
            other_fmt = growing.layers[growing.known[place]].format
        top, _ = growing.add(open_chain(other, gate, other_fmt, known=growing.known.keys()))
        return growing.tree([0]), top
    except BaseException:
        growing.close()
        raise


class _Growing:
    """Chains that are opened one after another, each file once."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.below: list[int | None] = []
        self.known: dict[FileId, int] = {}

    def add(self, chain: Chain) -> tuple[int, int]:
        """Take over the files of a chain, opened up to what is known.

        Returns: the indices of its active image, and of the last one opened.
        """
        first = len(self.layers)
        for layer in chain.layers:
            if layer.file.id in self.known:
                # Only the last one can be: it is another chain's already.
                _require_agreement(self.layers[self.known[layer.file.id]], layer)
                layer.data.close()
                layer.file.close()
            else:
                self.known[layer.file.id] = len(self.layers)
                self.layers.append(layer)
        joins = self.known[chain.layers[-1].file.id]
        count = len(self.layers)
        if count > first:
            self.below += range(first + 1, count)
            self.below.append(None if joins == count - 1 else joins)
        return self.known[chain.active.file.id], joins

    def tree(self, actives: Sequence[int]) -> ChainTree:
        return ChainTree(tuple(self.layers), tuple(self.below), tuple(actives))

    def close(self) -> None:
        close_layers(self.layers)


def _require_agreement(known: Layer, layer: Layer) -> None:
    if known.format != layer.format:
        raise ImageError(
            layer.path,
            f"one overlay records it as {known.format}, another one as {layer.format}",
            "record the right format with 'qemu-img rebase -u -F'",
        )
