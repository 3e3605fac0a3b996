"""Ranges laid over each other, as disjoint ones.

A hostile image may refer to one table a million times, or to a million tables that
overlap. Cut at every border and with their weights added up, no byte has to be read,
and no entry looked at, more than once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["I64", "overlay"]

I64 = npt.NDArray[np.int64]


def overlay(starts: I64, ends: I64, weights: I64) -> tuple[I64, I64, I64]:
    """Disjoint ranges, in order, that cover what the given ones cover.

    Args:
        starts: shape (n,).
        ends: shape (n,), exclusive.
        weights: shape (n, k), not negative; each column is added up on its own.

    Returns: starts and ends, shape (m,), and weights, shape (m, k). Neighbours differ
        in weight; ranges without any weight are left out.
    """
    points, where = np.unique(np.concatenate([starts, ends]), return_inverse=True)
    change = np.zeros((len(points), weights.shape[1]), np.int64)
    np.add.at(change, where, np.concatenate([weights, -weights]))
    borders = change.any(axis=1)
    points, level = points[borders], np.cumsum(change[borders], axis=0)
    if not len(points):
        return points, points, level
    covered = level[:-1].any(axis=1)
    return points[:-1][covered], points[1:][covered], level[:-1][covered]
