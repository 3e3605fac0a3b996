"""What a backing name means: which local file, in which format.

Besides plain names, qemu writes `json:` and `file:` names. Those that mean a local
file are understood; everything else (networks, filters, options) is refused by name.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from qchain.errors import ImageError, Unsupported

__all__ = ["BackingFile", "resolve_backing", "resolve_name"]

_FILE_DRIVERS = ("file", "host_device")
_TAME = frozenset(
    [
        "driver",
        "filename",
        "read-only",
        "auto-read-only",
        "discard",
        "cache.direct",
        "cache.no-flush",
        "aio",
        "locking",
    ]
)
"""Options of a file that change nothing of what is read."""


@dataclass(frozen=True, slots=True)
class BackingFile:
    """`plain`: the name is an ordinary file name, as a merge needs it."""

    path: Path
    format: str | None
    plain: bool


def resolve_name(name: str, overlay: Path) -> Path:
    """The path that a backing name of `overlay` means (see `resolve_backing`)."""
    return resolve_backing(name, None, overlay).path


def resolve_backing(name: str, fmt: str | None, overlay: Path) -> BackingFile:
    """The file that a backing name of `overlay` means.

    As qemu's `bdrv_get_full_backing_filename_from_filename`: an absolute name is
    itself, a relative one counts from the directory of the overlay's name (not of
    where a link leads).

    Args:
        fmt: the format that the overlay records; a `json:` name may say one too.

    Raises: `Unsupported` for what is no local file, `ImageError` for impossible names.
    """
    if not name or "\0" in name:
        raise ImageError(overlay, "its backing name is not a possible file name")
    if name.startswith("json:"):
        return _from_json(name[5:], fmt, overlay)
    protocol, colon, rest = name.partition(":")
    if colon and "/" not in protocol:
        if protocol == "file":
            return BackingFile(_absolute(rest, name, overlay), fmt, False)
        raise Unsupported(
            overlay,
            f"backing name {name!r} has the protocol {protocol!r}; only local files are read",
            "if it is a plain file name, record it as './NAME' or as an absolute path",
        )
    return BackingFile(overlay.parent / name, fmt, True)


def _absolute(filename: str, name: str, overlay: Path) -> Path:
    # qemu resolves these from its working directory: another file in each run.
    try:
        os.fsencode(filename)
    except UnicodeEncodeError:
        filename = "\0"
    if "\0" in filename:
        # JSON can spell what no file name can be: NULs, lone surrogates.
        raise ImageError(overlay, "its backing name is not a possible file name")
    if not filename.startswith("/"):
        raise Unsupported(
            overlay, f"backing name {name[:200]!r} is relative, to no known directory",
            "record an absolute path with 'qemu-img rebase -u'",
        )  # fmt: skip
    return Path(filename)


def _from_json(text: str, fmt: str | None, overlay: Path) -> BackingFile:
    def refuse(why: str) -> Unsupported:
        return Unsupported(
            overlay,
            f"its backing name 'json:{text[:120]}' {why}",
            "record the plain file name with 'qemu-img rebase -u'",
        )

    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        raise refuse("is not valid JSON") from None
    if not isinstance(options, dict):
        raise refuse("is not a JSON object")
    flat = _flatten(options)
    if flat is None:
        raise refuse("is nested too deep")
    driver = flat.pop("driver", None)
    file = {key[5:]: value for key, value in flat.items() if key.startswith("file.")}
    other = [key for key in flat if not key.startswith("file.")]
    if driver in _FILE_DRIVERS and not file:
        # The file without a format layer: {"driver": "file", "filename": ...}.
        file, driver, other = {"driver": driver, **flat}, fmt, []
    if other or any(key not in _TAME for key in file):
        unknown = next(iter(other), None) or next(key for key in file if key not in _TAME)
        raise refuse(f"uses the option {unknown!r}, which is not supported")
    if file.get("driver", "file") not in _FILE_DRIVERS or not isinstance(file.get("filename"), str):
        raise refuse("does not mean a local file")
    if driver is not None and not isinstance(driver, str):
        raise refuse("names no format")
    if driver is not None and fmt is not None and driver != fmt:
        raise refuse(f"says format {driver!r}, but {fmt!r} is recorded")
    # To qemu a prefix 'file:' here is part of the file's own name.
    return BackingFile(
        _absolute(str(file["filename"]), "json:" + text, overlay), driver or fmt, False
    )


def _flatten(
    options: dict[str, object], prefix: str = "", depth: int = 0
) -> dict[str, object] | None:
    """{"file": {"filename": x}} and {"file.filename": x} are the same to qemu."""
    if depth > 8:
        return None
    out: dict[str, object] = {}
    for key, value in options.items():
        # An empty object is an option like any other: it must not vanish here.
        if isinstance(value, dict) and value:
            inner = _flatten(value, f"{prefix}{key}.", depth + 1)
            if inner is None:
                return None
            out.update(inner)
        else:
            out[prefix + key] = value
    return out
