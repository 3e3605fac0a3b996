"""Fields of stored JSON: nothing of the wrong type or out of range gets any further.

All raise `ValueError`, with the reason, for any other value.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["flag", "index", "listed", "number", "one_of", "path_of", "text"]


def listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("a list is missing")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text is missing")
    os.fsencode(value)  # raises UnicodeEncodeError, a ValueError, for what no name can be
    if "\0" in value:
        raise ValueError("a text with a zero byte")
    return value


def one_of(value: Any, known: tuple[str, ...]) -> str:
    if text(value) not in known:
        raise ValueError(f"{value[:20]!r} is none of {', '.join(known)}")
    return str(value)


def number(value: Any, least: int | None = 0) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 64:
        raise ValueError("a number is missing")
    if least is not None and value < least:
        raise ValueError(f"the number {value} is less than {least}")
    return value


def index(value: Any, count: int) -> int:
    if number(value) >= count:
        raise ValueError(f"the number {value} of {count}")
    return int(value)


def path_of(value: Any) -> Path:
    path = Path(text(value))
    if not path.is_absolute():
        raise ValueError(f"{str(path)[:80]!r} is no absolute name")
    return path


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("a yes or no is missing")
    return value
