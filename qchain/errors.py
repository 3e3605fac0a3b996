"""Every error the library raises: fields, a reason, what to do, an exit code.

One class per way of failing; the text is put together in one place
(`QchainError.__str__`), so that every message has the same shape:
``<what>: <why>; <what to do>``.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import ClassVar

__all__ = [
    "Damaged",
    "DataError",
    "ExitCode",
    "FailedMidway",
    "ImageError",
    "NotAllowed",
    "QchainError",
    "Refused",
    "Unsupported",
    "UsageError",
    "WriteFailed",
    "printable",
]


class ExitCode(IntEnum):
    """What the process returns; outside scripts rely on these numbers."""

    DONE = 0
    NO = 1
    USAGE = 2
    REFUSED = 3
    INVALID = 4
    FAILED = 5
    INTERRUPTED = 130


def printable(text: object) -> str:
    """`text` on one line: control characters and broken UTF-8 are escaped.

    File names may hold anything but NUL; an error must stay one line, and a
    hostile name must not reach the terminal's escape sequences.
    """
    raw = text if isinstance(text, str) else str(text)
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in raw
    )


class QchainError(Exception):
    """Base of all errors. `what` names the file or thing, `why` the reason, `todo` the way on."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED
    todo: str = ""

    def __init__(self, what: str | Path, why: str, todo: str | None = None) -> None:
        super().__init__(what, why, todo)
        self.what = str(what)
        self.why = why
        if todo is not None:
            self.todo = todo

    def __str__(self) -> str:
        line = f"{printable(self.what)}: {printable(self.why)}"
        return f"{line}; {printable(self.todo)}" if self.todo else line


class UsageError(QchainError):
    """The request itself makes no sense (exit 2)."""

    exit_code = ExitCode.USAGE
    todo = "see --help"


class Refused(QchainError):
    """It could be done, but it would be unsafe; nothing was changed (exit 3)."""

    exit_code = ExitCode.REFUSED


class ImageError(QchainError):
    """An image is invalid, unsupported, missing or may not be opened (exit 4)."""

    exit_code = ExitCode.INVALID
    todo = "see 'qchain info' for what can still be read of it"


class Unsupported(ImageError):
    """A valid image uses something that this version does not handle (exit 4)."""


class NotAllowed(ImageError):
    """The open gate does not let this file be opened (exit 4)."""


class DataError(ImageError):
    """The metadata was fine, but data it points to cannot be read (exit 4)."""


class FailedMidway(QchainError):
    """A change failed after it began; every kept point is intact (exit 5)."""

    exit_code = ExitCode.FAILED
    todo = "every kept point is intact; 'qchain recover' continues"


class Damaged(FailedMidway):
    """What a merge was not to touch reads otherwise than before; nothing was deleted (exit 5)."""

    todo = (
        "nothing was deleted, but qemu-img, or the disk, has changed what was not to be touched: "
        "hold the images against a backup"
    )


class WriteFailed(QchainError):
    """A result could not be written to its end, and is gone again (exit 5)."""

    todo = "make room, and do it again"

    def __init__(self, what: str | Path, error: OSError) -> None:
        super().__init__(what, f"cannot be written: {(error.strerror or str(error)).lower()}")
