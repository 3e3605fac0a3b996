"""A new file for a result: never over one that exists, durable, gone again when it fails."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qchain.errors import Refused, UsageError, WriteFailed

__all__ = ["new_file", "write_all"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def new_file(output: Path, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Open the new file `output` for writing, unbuffered; on leaving it is fsynced.

    A name that exists may be an image, so it is never written over.

    Raises: `Refused` when it exists; `UsageError` when it cannot be made; `WriteFailed` when
        it cannot be written to its end.
    """
    try:
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise Refused(output, "exists already", "name another file, or remove it") from None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in _FULL:
            raise WriteFailed(output, error) from None  # type: ignore[arg-type]
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise UsageError(output, why, "name a file that can be written") from None
    try:
        with os.fdopen(fd, "wb", buffering=0) as stream:
            yield stream
            os.fsync(stream.fileno())
    except BaseException as error:
        with contextlib.suppress(OSError):
            output.unlink()
        if isinstance(error, OSError):
            raise WriteFailed(output, error) from None
        raise


def write_all(stream: BinaryIO, data: bytes) -> None:
    """Write all of `data` to an unbuffered stream, which may take less at a time."""
    done = 0
    while done < len(data):
        done += stream.write(data[done:])
