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
    "shortened",
    "size_text",
    "table",
    "write_table",
]

_GAP = 2  # columns between two of a table
_SHORTEST = 10  # characters of a name that still say something
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
        out.print(table(heads, rows, out.width))
    write("".join(f"{line.rstrip()}\n" for line in text.get().splitlines()))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], width: int) -> Table | Text:
    """A plain table. A column whose heading ends in '>' is aligned to the right.

    Where it is wider than `width` columns, names are shortened in the middle: it is their end
    that tells them apart. Where that does not do, each row becomes two lines or more.
    """
    from rich.table import Table
    from rich.text import Text

    words = [head.rstrip(">") for head in heads]
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(words, *cells, strict=True)]
    name = max(
        (at for at, head in enumerate(heads) if not head.endswith(">")),
        key=lambda at: widths[at],
        default=0,
    )
    room = width - sum(widths) - _GAP * (len(heads) - 1) + widths[name]
    if room < min(widths[name], _SHORTEST):
        return Text("\n".join(_two_lines(words, row, widths[:name], width) for row in cells))
    out = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
    for head in heads:
        right = head.endswith(">")
        out.add_column(head.rstrip(">"), justify="right" if right else "left", no_wrap=True)
    for row in cells:
        row[name] = shortened(row[name], room)
        out.add_row(*(safe(cell) for cell in row))
    return out


def shortened(name: str, room: int) -> str:
    """`name` in at most `room` characters, the middle left out and the end kept."""
    if len(name) <= room:
        return name
    begin = max(1, (room - 8) // 2)
    return f"{name[:begin]}…{name[begin + 1 - room :]}"


def _two_lines(words: Sequence[str], row: Sequence[str], widths: list[int], width: int) -> str:
    """A row of a table that is too wide: up to its name, and below that the rest, with words."""
    name = len(widths)
    lead = "".join(f"{cell:<{each + _GAP}}" for cell, each in zip(row, widths, strict=False))
    told = list(zip(words, row, strict=True))[name + 1 :]
    # A number and its unit stay together.
    rest = ", ".join(f"{word} {cell}".replace(" ", "\0") for word, cell in told)
    indent = " " * 4
    lines = textwrap.wrap(rest, max(width - len(indent), 20), break_on_hyphens=False)
    lines = [line.replace("\0", " ") for line in lines]
    first = lead + shortened(row[name], max(width - len(lead), _SHORTEST))
    return "\n".join([first.rstrip(), *(indent + line for line in lines)])
