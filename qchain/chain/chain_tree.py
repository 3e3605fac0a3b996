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
from qchain.chain.layer import Layer
from qchain.errors import ImageError, UsageError
from qchain.hostfile import FileId

__all__ = ["ChainTree", "open_tree", "tree_of"]


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
        for layer in self.layers:
            layer.data.close()
            layer.file.close()

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
    layers: list[Layer] = []
    below: list[int | None] = []
    tops: list[int] = []
    known: dict[FileId, int] = {}
    try:
        for path in actives:
            chain = open_chain(Path(path), gate, fmt, known=known.keys())
            first = len(layers)
            for layer in chain.layers:
                if layer.file.id in known:
                    # Only the last one can be: it is another chain's already.
                    _require_agreement(layers[known[layer.file.id]], layer)
                    layer.data.close()
                    layer.file.close()
                else:
                    known[layer.file.id] = len(layers)
                    layers.append(layer)
            joins = known[chain.layers[-1].file.id]
            if len(layers) == first or joins in tops:
                what = chain.active.path if len(layers) == first else layers[joins].path
                raise UsageError(
                    what,
                    "is named twice, or another active image backs on it",
                    "name the uppermost images only, each once",
                )
            tops.append(first)
            below += range(first + 1, len(layers))
            below.append(None if joins == len(layers) - 1 else joins)
        return ChainTree(tuple(layers), tuple(below), tuple(tops))
    except BaseException:
        for layer in layers:
            layer.data.close()
            layer.file.close()
        raise


def _require_agreement(known: Layer, layer: Layer) -> None:
    if known.format != layer.format:
        raise ImageError(
            layer.path,
            f"one overlay records it as {known.format}, another one as {layer.format}",
            "record the right format with 'qemu-img rebase -u -F'",
        )
