"""Signs that a base was changed after its overlay was made; such an overlay reads as garbage.

Nothing in the format records it. What the files tell:

- The overlay was made no later than its birth (where the filesystem keeps that) and no later
  than its last write. A base written after the earlier of the two is suspect. The last write
  alone would not do: an overlay in use is always newer than its base.
- A base longer than its overlay may have been resized underneath it.
- A seal beside an image says what it and its bases were like.

These are signs, not proofs: a copy that does not keep times shows them too. A live snapshot
flushes the base just after the overlay was made, hence `GRACE`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qchain.chain.layer import Layer
from qchain.chain.names import resolve_backing
from qchain.errors import QchainError
from qchain.forensics.seal import HEADER_BYTES, SEAL_SUFFIX, file_digest, read_seal
from qchain.hostfile import HostFile

__all__ = [
    "GRACE",
    "birth_ns",
    "older_than_base",
    "relocated",
    "seal_signs",
    "staleness",
    "tree_staleness",
]

GRACE = 60_000_000_000
"""Nanoseconds that a base may be newer than its overlay without a warning."""

_MAX_SEAL, _MAX_SEALS = 4 << 20, 16 << 20  # bytes of one seal, and of all of a chain
_STATX_BTIME = 0x800
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000


@functools.cache
def _statx() -> Any:
    """statx(2) of the C library, or None: Python 3.11 does not offer it."""
    return getattr(ctypes.CDLL(None, use_errno=True), "statx", None)


def birth_ns(file: HostFile | Path) -> int | None:
    """When the inode was made, in nanoseconds since 1970; None where that is not kept.

    By statx(2); the layout of its result is part of the kernel's interface.
    """
    call = _statx()
    if call is None:
        return None
    out = ctypes.create_string_buffer(256)
    if isinstance(file, HostFile):
        failed = call(file.fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, out)
    else:
        failed = call(_AT_FDCWD, os.fsencode(file), 0, _STATX_BTIME, out)
    if failed or not int.from_bytes(out.raw[0:4], "little") & _STATX_BTIME:
        return None
    seconds = int.from_bytes(out.raw[80:88], "little", signed=True)
    return seconds * 10**9 + int.from_bytes(out.raw[88:92], "little")


def older_than_base(
    overlay_mtime: int, overlay_birth: int | None, base_mtime: int, base_name: str
) -> str | None:
    """One sentence when the times (nanoseconds) say that the base was changed; else None."""
    made = overlay_mtime if overlay_birth is None else min(overlay_birth, overlay_mtime)
    if base_mtime <= made + GRACE:
        return None
    return (
        f"its backing file {base_name} was written at {_when(base_mtime)}, after this overlay "
        f"was made ({_when(made)} at the latest): what it reads may be wrong, "
        "unless a merge wrote it"
    )


def staleness(layers: Sequence[Layer]) -> list[str]:
    """The signs in a chain (active first), one sentence each; empty is good."""
    found = seal_signs(layers)
    for overlay, base in itertools.pairwise(layers):
        name = overlay.path.name
        # The times of device nodes are those of their making.
        devices = overlay.file.is_block_device or base.file.is_block_device
        written = max(base.file.mtime_ns, base.data.mtime_ns)
        sign = older_than_base(
            overlay.file.mtime_ns, birth_ns(overlay.file), written, base.path.name
        )
        if sign is not None and not devices:
            found.append(f"{name}: {sign}")
        if base.size > overlay.size:
            found.append(
                f"{name}: its backing file {base.path.name} is longer ({base.size} bytes) than "
                f"itself ({overlay.size}): perhaps it was resized after this overlay was made"
            )
    return found


def relocated(layers: Sequence[Layer]) -> list[str]:
    """Backing files found elsewhere than where their overlays say, one sentence each.

    They were found by name alone, and the format keeps no identity of a base.
    """
    found = []
    for overlay, base in itertools.pairwise(layers):
        if overlay.backing is None:
            continue
        backing = resolve_backing(overlay.backing.name, overlay.backing.format, overlay.path)
        if backing.path != base.path:
            found.append(
                f"{overlay.path.name}: its backing file is recorded as {backing.path}; "
                f"{base.path} was taken for it, by its name"
            )
    return found


def seal_signs(layers: Sequence[Layer]) -> list[str]:
    """What the seals that lie beside the images (NAME.seal.json) say against them.

    Sizes, times and headers are held against a seal, not whole contents: that is for
    'qchain verify'. A seal that cannot be read is passed over, for anybody can put one there.
    """
    found: dict[str, None] = {}
    header = functools.cache(lambda file: file_digest(file, HEADER_BYTES))
    room = _MAX_SEALS
    for depth, layer in enumerate(layers):
        path = layer.path.with_name(layer.path.name + SEAL_SUFFIX)
        try:
            room -= path.stat().st_size
            seal = read_seal(path, _MAX_SEAL if room > 0 else 0)
        except (QchainError, OSError, ValueError):
            continue
        sealed = {entry["name"]: entry for entry in seal["layers"]}
        for each in layers[depth:]:
            entry = sealed.get(each.path.name)
            what = None if entry is None else _against(each, entry, header)
            if what is not None:
                text = f"{each.path.name}: {what} was sealed ({path.name}, {seal['sealed']})"
                found[f"{text}: it was changed since"] = None
    return list(found)


def _against(layer: Layer, entry: dict[str, Any], header: Callable[[HostFile], str]) -> str | None:
    if layer.file.size != entry["size"]:
        return f"is {layer.file.size} bytes long, not {entry['size']} as"
    if header(layer.file) != entry["header_sha256"]:
        return "has other first 64 KiB than"
    if layer.file.mtime_ns > entry["mtime_ns"] + GRACE:
        return f"was written at {_when(layer.file.mtime_ns)}, later than the file that"
    return None


def tree_staleness(overlay: Path, base: Path) -> str | None:
    """As `staleness` for one overlay and its base by name: times only, nothing is opened."""
    try:
        above, below = overlay.stat(), base.stat()
    except (OSError, ValueError):
        return None
    return older_than_base(above.st_mtime_ns, birth_ns(overlay), below.st_mtime_ns, base.name)


def _when(nanoseconds: int) -> str:
    try:
        moment = datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    except (OverflowError, ValueError, OSError):
        return f"{nanoseconds // 10**9} s since 1970"
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
