"""virsh's words for a merge: blockcommit and blockpull, as requests with the strategy fixed.

commit, top a, base b    … <- b* <- what backs on a      a's content under b's name
pull into a, base b      … <- b <- a*                     a keeps its name
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qchain.chain.layer import Layer
from qchain.errors import UsageError
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Request, find_layer

__all__ = ["commit_request", "pull_request"]


def commit_request(
    layers: Sequence[Layer], base: str | None, top: str | None, options: MergeOptions
) -> tuple[Request, MergeOptions]:
    """Commit `top` (None: the active image) and what lies between into `base` (None: the lowest).

    The file of `base` then holds the content of `top`, under the name of `base`; the points
    of `base` and of what lies between vanish, and so does the name of `top`.

    Raises: `UsageError` when `base` is not below `top`, nothing is, or one is not in the chain.
    """
    above = 0 if top is None else find_layer(top, layers)
    below = len(layers) - 1 if base is None else find_layer(base, layers)
    if above == len(layers) - 1:
        raise UsageError(
            layers[above].path,
            "has no backing file: there is nothing below it to commit into",
            "name an image above it ('qchain tree' shows them)",
        )
    if below <= above:
        raise UsageError(
            layers[below].path,
            f"is not below {layers[above].path.name}",
            "name a base below the top",
        )
    names = tuple(str(layer.path) for layer in layers[above + 1 : below + 1])
    return Request(drop=names), replace(options, strategy="commit", names="lowest")


def pull_request(
    layers: Sequence[Layer], base: str | None, options: MergeOptions
) -> tuple[Request, MergeOptions]:
    """Pull into `layers[0]` what lies between it and `base` (None: all, and no backing is left).

    Where nothing lies between, the request drops nothing.

    Raises: `UsageError` when `base` is the image itself or not in its chain.
    """
    below = len(layers) if base is None else find_layer(base, layers)
    if below == 0:
        raise UsageError(layers[0].path, "cannot be its own base", "name an image below it")
    names = tuple(str(layer.path) for layer in layers[1:below])
    rest = tuple(str(layer.path) for layer in layers[1:])
    if names:
        request = Request(drop=names)
    else:
        request = Request(keep=rest) if rest else Request(flatten=True)
    return request, replace(options, strategy="pull", names="kept")
