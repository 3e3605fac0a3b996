"""Tables for people: sizes in words, names made harmless.

On a terminal they fit into its columns; elsewhere no name is ever broken over lines.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qchain.errors import printable

from .output import columns, console, write

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = [
    "count_text",
    "facts",
    "fold",
    "safe",
    "seconds_text",
    "size_text",
    "table",
    "write_table",
]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size_text(size: int | None) -> str:
    """Bytes for a person, three digits or so: 1536 is '1.50 KiB'; None is '-'."""
    if size is None:
        return "-"
    value = float(size)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1024
    if unit == "B":
        return f"{size} B"
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def count_text(count: int, word: str) -> str:
    """'1 layer', '3 layers', '1,024 layers'."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def seconds_text(seconds: float) -> str:
    """A duration for a person."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def facts(rows: Iterable[tuple[str, str]], width: int | None = None) -> str:
    """'name  value' lines, values aligned and wrapped; empty values are left out.

    Args:
        width: columns; by default those of stdout (`output.columns`).

    Without rich: for single answers, it would cost more time than the answer.
    """
    found = [(name, printable(value)) for name, value in rows if value]
    column = max((len(name) for name, _ in found), default=0) + 2
    room = max((columns() if width is None else width) - column, 20)
    lines: list[str] = []
    previous = None
    for name, value in found:
        parts = _wrap(value, room)
        head = "" if name == previous else name
        lines.append(f"{head:<{column}}{parts[0]}")
        lines += [" " * column + part for part in parts[1:]]
        previous = name
    return "".join(line.rstrip() + "\n" for line in lines)


def _wrap(text: str, room: int) -> list[str]:
    if len(text) <= room:
        return [text]
    return textwrap.wrap(text, room, break_on_hyphens=False) or [""]


def fold(lead: str, text: str, below: str) -> str:
    """`lead` and `text` as one line, or on a terminal that is too narrow as several.

    Args:
        below: what further lines begin with.
    """
    room = columns()
    if len(lead) + len(text) <= room:
        return f"{lead}{text}\n"
    first = max(room - len(lead), 20)
    further = max(room - len(below), 20)
    rest = text[first:]
    parts = [rest[at : at + further] for at in range(0, len(rest), further)]
    return f"{lead}{text[:first]}\n" + "".join(f"{below}{part}\n" for part in parts)


def safe(text: object) -> Text:
    """Any text, a file name above all, as one that no markup or escape gets through."""
    from rich.text import Text

    return Text(printable(text), overflow="fold")


def write_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table (`table`) to stdout, with no spaces at the ends of its lines."""
    out = console()
    with out.capture() as text:
        out.print(table(heads, rows))
    write("".join(f"{line.rstrip()}\n" for line in text.get().splitlines()))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table. A column whose heading ends in '>' is aligned to the right."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for head in heads:
        right = head.endswith(">")
        out.add_column(
            head.rstrip(">"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
        )
    for row in rows:
        out.add_row(*(safe(cell) for cell in row))
    return out
