"""A seal: digests of every file of a chain and of the point, written down to be checked later.

The manifest is JSON, for people and for other tools: the digests are those of sha256sum on the
files, and of 'qemu-img convert -O raw' on the active image.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qchain.chain.chain import Chain
from qchain.chain.digest import digest
from qchain.chain.ownership import workers
from qchain.errors import ImageError, UsageError
from qchain.hostfile import HostFile
from qchain.memory import aligned

__all__ = ["HEADER_BYTES", "SEAL_SUFFIX", "file_digest", "make_seal", "read_seal", "seal_text"]

FORMAT = 1
_PIECE = 4 << 20
HEADER_BYTES = 65536
"""Of each file, the beginning that is digested on its own."""
SEAL_SUFFIX = ".seal.json"
_MAX_SEAL = 256 << 20

Progress = Callable[[int, int], None]


def file_digest(file: HostFile, length: int | None = None, progress: Progress | None = None) -> str:
    """Hexadecimal SHA-256 of the first `length` bytes of a file (None: all of it).

    Raises: `DataError` when it cannot be read.
    """
    state = hashlib.sha256()
    view = memoryview(aligned(_PIECE).data)
    end = file.size if length is None else min(length, file.size)
    done = 0
    while done < end:
        count = file.pread_into(view[: min(_PIECE, end - done)], done)
        if count == 0:
            break
        state.update(view[:count])
        done += count
        if progress is not None:
            progress(done, end)
    return state.hexdigest()


def make_seal(chain: Chain, progress: Progress | None = None) -> dict[str, Any]:
    """The manifest of a chain: every layer's file and the content of the active point.

    `progress` hears of the point's content only; the files are read at the same time. Where
    the content cannot be read (no passphrase, a damaged cluster), its digest is None and
    `unreadable` says why: files can be sealed all the same.

    Raises: `ImageError` when a file cannot be read.
    """
    files = [layer.file for layer in chain.layers]
    files += [layer.data for layer in chain.layers if layer.data is not layer.file]
    point, unreadable = None, None
    with ThreadPoolExecutor(workers()) as pool:
        waiting = {file.id: pool.submit(file_digest, file) for file in files}
        try:
            point = digest(chain.layers, "sha256", progress)
        except ImageError as error:
            unreadable = str(error)
        digests = {which: future.result() for which, future in waiting.items()}
    layers = []
    for layer in chain.layers:
        entry: dict[str, Any] = {"format": layer.format, "virtual_size": layer.size}
        entry |= _facts(layer.file, digests[layer.file.id])
        backing = layer.backing
        entry["backing"] = (
            None if backing is None else {"name": backing.name, "format": backing.format}
        )
        if layer.data is not layer.file:
            entry["data_file"] = _facts(layer.data, digests[layer.data.id])
        layers.append(entry)
    return {
        "seal": FORMAT,
        "tool": f"qchain {version('qchain')}",
        "sealed": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "point": {"virtual_size": chain.size, "sha256": point},
        "unreadable": unreadable,
        "missing": None if chain.missing is None else str(chain.missing),
        "layers": layers,
    }


def _facts(file: HostFile, sha256: str) -> dict[str, Any]:
    return {
        "name": file.path.name,
        "path": os.path.abspath(file.path),
        "size": file.size,
        "mtime_ns": file.mtime_ns,
        "header_sha256": file_digest(file, HEADER_BYTES),
        "sha256": sha256,
    }


def seal_text(seal: dict[str, Any]) -> bytes:
    """The manifest as the text of a file."""
    return (json.dumps(seal, indent=2) + "\n").encode("ascii")


def read_seal(path: Path, most: int = _MAX_SEAL) -> dict[str, Any]:
    """The manifest in `path`, of at most `most` bytes.

    Raises: `ImageError` when there is none, `UsageError` for another file.
    """
    with HostFile(path) as file:
        if file.size > most:
            raise UsageError(path, "is too large to be a seal", "name what 'qchain seal' wrote")
        text = file.pread(0, file.size)
    try:
        seal = json.loads(text)
        good = seal["seal"] == FORMAT and isinstance(seal["sealed"], str)
        good = good and isinstance(seal["point"]["sha256"], str | None) and bool(seal["layers"])
        good = good and isinstance(seal.get("missing"), str | None)
        good = good and all(_complete(layer) for layer in seal["layers"])
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise UsageError(path, "is no seal of this version", "name what 'qchain seal' wrote")
    found: dict[str, Any] = seal
    return found


def _complete(facts: dict[str, Any]) -> bool:
    types = {"name": str, "size": int, "mtime_ns": int, "header_sha256": str, "sha256": str}
    good = all(isinstance(facts[name], kind) for name, kind in types.items())
    return (
        good
        and isinstance(facts.get("path"), str | None)
        and ("data_file" not in facts or _complete(facts["data_file"]))
    )
