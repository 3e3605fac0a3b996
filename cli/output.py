"""What leaves the process: text and JSON on stdout, one-line messages on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from qchain.errors import Refused, UsageError, WriteFailed, printable

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

__all__ = [
    "ENDLESS",
    "NotWritten",
    "OutputClosed",
    "absolute",
    "columns",
    "console",
    "done_already",
    "forget_stdout",
    "note",
    "save_json",
    "shell_word",
    "write",
    "write_ascii",
    "write_error",
    "write_json",
]

ENDLESS = 1 << 20
"""Columns of what is no terminal: names stay whole, one row is one line."""


class NotWritten(WriteFailed):
    """stdout cannot be written: a full disk."""

    def __init__(self, error: OSError) -> None:
        super().__init__("output", error)


class OutputClosed(Exception):
    """Whoever read our output has gone away (`qchain map ... | head`)."""


def write(text: str) -> None:
    """`text` to stdout as it is. Raises `OutputClosed`, and `NotWritten` on a full disk."""
    if sys.stdout is None:
        raise OutputClosed
    try:
        sys.stdout.write(text)
        # Everything is written in large pieces, and a failure must be met here.
        sys.stdout.flush()
    except BrokenPipeError:
        raise OutputClosed from None
    except OSError as error:
        raise NotWritten(error) from None


def write_ascii(text: bytes) -> None:
    """As `write`, for much text that is made as bytes."""
    binary = getattr(sys.stdout, "buffer", None)
    if binary is None:
        write(text.decode("ascii"))
        return
    try:
        binary.write(text)
        binary.flush()
    except BrokenPipeError:
        raise OutputClosed from None
    except OSError as error:
        raise NotWritten(error) from None


@contextmanager
def done_already(what: str) -> Iterator[None]:
    """Tell of `what` that is done: that nobody can be told does not make it fail.

    A full disk is mentioned on stderr, for then the document on stdout is incomplete.
    """
    try:
        yield
    except OutputClosed:
        forget_stdout()
    except NotWritten as error:
        forget_stdout()
        note(f"{error}; {what}")


def forget_stdout() -> None:
    """Nobody can have it: let the interpreter's last flush go nowhere, and not fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)


def write_json(document: object) -> None:
    """One JSON document. ASCII, so that it survives any terminal, locale and file name."""
    write(json.dumps(document, indent=2) + "\n")


def save_json(document: object, path: Path) -> None:
    """The document into a file: a new one, or one that holds such a document already.

    Raises: `Refused` for any other file (it might be an image of the chain), `UsageError`
        when it cannot be written.
    """
    try:
        mode = "w" if _is_plan(path) else "x"
        with path.open(mode, encoding="ascii") as file:
            # Who can write to a plan can make it another one.
            os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & 0o755)
            file.write(json.dumps(document, indent=2) + "\n")
    except FileExistsError:
        raise Refused(path, "exists already and is no plan", "name another file") from None
    except (OSError, ValueError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise UsageError(path, why, "name a file that can be written") from None


def _is_plan(path: Path) -> bool:
    """Whether a regular file holds a plan. Anything else is not ours to write over."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size > 1 << 28:
        return False
    with path.open("rb") as file:
        if file.read(1) != b"{":
            return False
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"active", "groups", "steps"} <= document.keys()


def note(text: str) -> None:
    """One line on stderr. Never fails: nobody may be listening any more."""
    write_error(f"qchain: {printable(text)}")


def write_error(line: str) -> None:
    """A finished line to stderr."""
    try:
        if sys.stderr is not None:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
    except (OSError, ValueError):
        pass


def absolute(path: Path) -> str:
    """The name that JSON documents give: absolute, links not followed."""
    return os.path.abspath(path)


def shell_word(word: str) -> str:
    """`word` quoted for a shell, harmless to a terminal.

    `$'...'` is understood by bash, zsh, ksh and POSIX shells since 2024.
    """
    if word.isprintable():
        return shlex.quote(word)
    safe = (
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\{byte:03o}"
        for byte in os.fsencode(word)
    )
    return f"$'{''.join(safe)}'"


class _Stream:
    """What rich writes to. It would end the process on a broken pipe, amid a merge even.

    On stdout failures are ours (`write`); on stderr they do not matter.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if self._stream is sys.stdout:
            write(text)
        else:
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        # `write` has flushed stdout.
        if self._stream is not sys.stdout:
            with contextlib.suppress(OSError, ValueError):
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def columns() -> int:
    """Columns that a line on stdout may have: those of the terminal, `ENDLESS` if it is none."""
    if sys.stdout is None or not sys.stdout.isatty():
        return ENDLESS
    return shutil.get_terminal_size().columns


def console(stderr: bool = False) -> Console:
    """A rich console: no line is broken and no colour unless it is a terminal, no markup ever."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    if stream is None:
        raise OutputClosed
    terminal = stream.isatty()
    plain = not terminal or bool(os.environ.get("NO_COLOR"))
    return Console(
        file=_Stream(stream),  # type: ignore[arg-type]
        width=None if terminal else ENDLESS,
        # Named, because the environment (FORCE_COLOR) would decide otherwise.
        force_terminal=terminal,
        color_system=None if plain else "auto",
        no_color=plain,
        highlight=False,
        markup=False,
        emoji=False,
    )
