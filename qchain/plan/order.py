"""In which order to merge the groups, so that the least extra space is needed at any time.

Each group needs room while it is merged and gives some back when its files go:

    space |    peak
          |   /\\
          |__/  \\___ net (what stays: growth less what was freed)

Some must wait for others (an heir for those who still need what it inherits, a lower
group for the upper ones), each for several but no two for the same one: a tree. For trees
the order with the least peak is known (Abdel-Wahab and Kameda, 1978, "Scheduling to
minimize maximum cumulative cost"): the course of each subtree is cut into pieces that may
be sorted together with those of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Job", "least_peak_order", "peak_of"]


@dataclass(frozen=True, slots=True)
class Job:
    """A group's use of space, in bytes: the most while it is merged, and what stays of it.

    `before`: the number of the job that must come later, if there is one.
    """

    peak: int
    net: int
    before: int | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Jobs that are done one after the other: the highest point, and the level at the end."""

    peak: int
    net: int
    jobs: tuple[int, ...]


def peak_of(jobs: Sequence[Job], order: Sequence[int]) -> int:
    """The most extra space that is needed at any time."""
    level = highest = 0
    for number in order:
        highest = max(highest, level + jobs[number].peak)
        level += jobs[number].net
    return highest


def least_peak_order(jobs: Sequence[Job]) -> list[int]:
    """The order of the least peak; of equally good ones, that of the numbers if it is one."""
    children: list[list[int]] = [[] for _ in jobs]
    roots: list[int] = []
    for number, job in enumerate(jobs):
        (roots if job.before is None else children[job.before]).append(number)
    done: dict[int, list[_Piece]] = {}
    for number in _from_leaves(roots, children):
        pieces = _merged([done.pop(child) for child in children[number]])
        job = jobs[number]
        done[number] = _canonical([*pieces, _Piece(max(job.peak, job.net), job.net, (number,))])
    return [job for piece in _merged([done[root] for root in roots]) for job in piece.jobs]


def _from_leaves(roots: list[int], children: list[list[int]]) -> list[int]:
    order = list(roots)
    for number in order:
        order.extend(children[number])
    return order[::-1]


def _merged(courses: list[list[_Piece]]) -> list[_Piece]:
    """The pieces of several subtrees in the best order (within each they are in it)."""
    return sorted((piece for course in courses for piece in course), key=_rank)


def _rank(piece: _Piece) -> tuple[int, int]:
    """What gives room comes first, what needs the least for it before the rest; then what
    takes room, that which falls deepest from its peak before the rest."""
    if piece.net < 0:
        return 0, piece.peak
    return 1, piece.net - piece.peak


def _canonical(pieces: list[_Piece]) -> list[_Piece]:
    """Join what must follow each other but would be sorted the other way round.

    (peak p, net n) followed by (q, m) is (max(p, n + q), n + m).
    """
    out: list[_Piece] = []
    for piece in pieces:
        last = piece
        while out and _rank(last) < _rank(out[-1]):
            first = out.pop()
            peak = max(first.peak, first.net + last.peak)
            last = _Piece(peak, first.net + last.net, first.jobs + last.jobs)
        out.append(last)
    return out
