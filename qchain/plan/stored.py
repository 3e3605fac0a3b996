"""Steps as JSON and back: what a journal keeps, so that another process can go on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_args

from qchain.errors import ImageError
from qchain.plan.steps import Step

__all__ = ["step_from_json", "step_to_json"]

_KINDS = {kind.__name__: kind for kind in get_args(Step)}
_PATHS = frozenset({"path", "image", "into", "old", "new", "below", "backing", "existing",
                    "link", "target", "source", "cwd", "final", "manifest",
                    "pending"})  # fmt: skip


def step_to_json(step: Step) -> dict[str, object]:
    """Every field of a step under its name, and its kind under "step"."""
    out: dict[str, object] = {"step": type(step).__name__}
    for field in fields(step):
        value = getattr(step, field.name)
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = [str(item) for item in value]
        out[field.name] = value
    return out


def step_from_json(stored: object) -> Step:
    """The step that `step_to_json` gave. Raises `ImageError` for anything else."""
    try:
        if not isinstance(stored, dict):
            raise TypeError("not an object")
        values = dict(stored)
        kind = _KINDS[values.pop("step")]
        for name, value in values.items():
            if name in _PATHS and value is not None:
                values[name] = Path(value)
            elif name == "writes":
                values[name] = tuple(Path(item) for item in value)
            elif name in ("argv", "names", "gone"):
                values[name] = tuple(value)
        made: Step = kind(**values)
    except (KeyError, TypeError) as error:
        raise ImageError("journal", f"holds no step of a merge: {error}", "") from None
    return made
