"""One sentence a person believes: why this way of merging a group, and not another."""

from __future__ import annotations

from collections.abc import Sequence

from qchain.chain.layer import Layer
from qchain.plan.choice import GroupPlan

__all__ = ["reason"]


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
    if chosen is None:
        return "no way is possible"
    moved = _human(chosen.write_bytes)
    if chosen.target is None:
        said = f"a copy into a new file writes {moved}"
    else:
        said = f"{chosen.strategy} into {layers[chosen.target].path.name} moves {moved}"
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
