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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qchain.chain.chain import Chain
from qchain.chain.digest import digest
from qchain.chain.ownership import workers
from qchain.errors import UsageError
from qchain.forensics.newfile import new_file, write_all
from qchain.hostfile import HostFile

__all__ = ["SealCheck", "check_seal", "file_digest", "make_seal", "read_seal", "write_seal"]

FORMAT = 1
_PIECE = 4 << 20
_HEADER = 65536
_MAX_SEAL = 256 << 20

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class SealCheck:
    """What a chain is like, held against its seal.

    `changes`: sentences, each about a change of content. `notes`: other names or times of
    the same content. `point_same`: the guest still sees what it saw.
    """

    sealed: str
    point_same: bool
    changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        return not self.changes


def file_digest(file: HostFile, length: int | None = None, progress: Progress | None = None) -> str:
    """Hexadecimal SHA-256 of the first `length` bytes of a file (None: all of it).

    Raises: `DataError` when it cannot be read.
    """
    state = hashlib.sha256()
    buffer = bytearray(_PIECE)
    view = memoryview(buffer)
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

    `progress` hears of the point's content only; the files are read at the same time.

    Raises: `ImageError` when anything cannot be read.
    """
    files = [layer.file for layer in chain.layers]
    files += [layer.data for layer in chain.layers if layer.data is not layer.file]
    with ThreadPoolExecutor(workers()) as pool:
        waiting = {file.id: pool.submit(file_digest, file) for file in files}
        point = digest(chain.layers, "sha256", progress)
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
        "missing": None if chain.missing is None else str(chain.missing),
        "layers": layers,
    }


def _facts(file: HostFile, sha256: str) -> dict[str, Any]:
    return {
        "name": file.path.name,
        "path": os.path.abspath(file.path),
        "size": file.size,
        "mtime_ns": file.mtime_ns,
        "header_sha256": file_digest(file, _HEADER),
        "sha256": sha256,
    }


def write_seal(seal: dict[str, Any], output: Path) -> None:
    """Write the manifest into the new file `output`. Raises: as `newfile.new_file`."""
    with new_file(output, 0o644) as stream:
        write_all(stream, (json.dumps(seal, indent=2) + "\n").encode("ascii"))


def read_seal(path: Path) -> dict[str, Any]:
    """The manifest in `path`. Raises `ImageError` when there is none, `UsageError` for another."""
    with HostFile(path) as file:
        if file.size > _MAX_SEAL:
            raise UsageError(path, "is too large to be a seal", "name what 'qchain seal' wrote")
        text = file.pread(0, file.size)
    try:
        seal = json.loads(text)
        good = seal["seal"] == FORMAT and isinstance(seal["sealed"], str)
        good = good and isinstance(seal["point"]["sha256"], str) and bool(seal["layers"])
        good = good and all(_complete(layer) for layer in seal["layers"])
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise UsageError(path, "is no seal of this version", "name what 'qchain seal' wrote")
    found: dict[str, Any] = seal
    return found


def _complete(facts: dict[str, Any]) -> bool:
    types = {"name": str, "size": int, "mtime_ns": int, "header_sha256": str, "sha256": str}
    return all(isinstance(facts[name], kind) for name, kind in types.items()) and (
        "data_file" not in facts or _complete(facts["data_file"])
    )


def check_seal(chain: Chain, seal: dict[str, Any], progress: Progress | None = None) -> SealCheck:
    """Read everything again and hold it against `seal` (of `read_seal`).

    Raises: `ImageError` when anything cannot be read.
    """
    now = make_seal(chain, progress)
    same = bool(now["point"] == seal["point"])
    out = SealCheck(seal["sealed"], same)
    if len(now["layers"]) != len(seal["layers"]):
        out.changes.append(
            f"the chain has {len(now['layers'])} images, {len(seal['layers'])} were sealed"
        )
    for found, sealed in zip(now["layers"], seal["layers"], strict=False):
        if found["format"] != sealed.get("format"):
            out.changes.append(f"{found['name']}: is {found['format']}, not {sealed.get('format')}")
        _compare(found, sealed, out)
        if ("data_file" in found) != ("data_file" in sealed):
            out.changes.append(f"{found['name']}: has another data file")
        elif "data_file" in found:
            _compare(found["data_file"], sealed["data_file"], out)
    if not same:
        out.changes.append("the guest sees another content than was sealed")
    return out


def _compare(found: dict[str, Any], sealed: dict[str, Any], out: SealCheck) -> None:
    name = found["name"]
    if found["sha256"] != sealed["sha256"]:
        parts = []
        if found["size"] != sealed["size"]:
            parts.append(f"its size is {found['size']}, not {sealed['size']} bytes")
        if found["header_sha256"] != sealed["header_sha256"]:
            parts.append("its first 64 KiB differ")
        if found["mtime_ns"] == sealed["mtime_ns"]:
            parts.append("though its time of change is the same")
        detail = f" ({', '.join(parts)})" if parts else ""
        out.changes.append(f"{name}: the file was changed{detail}")
    elif found["mtime_ns"] != sealed["mtime_ns"]:
        out.notes.append(f"{name}: another time of change, the same content")
    if name != sealed["name"]:
        out.notes.append(f"{name}: was sealed under the name {sealed['name']}")
