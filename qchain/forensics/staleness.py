"""Signs that a base was changed after its overlay was made; such an overlay reads as garbage.

Nothing in the format records it. What the files tell:

- The overlay was made no later than its birth (where the filesystem keeps that) and no later
  than its last write. A base written after the earlier of the two is suspect. The last write
  alone would not do: an overlay in use is always newer than its base.
- A base longer than its overlay may have been resized underneath it.

These are signs, not proofs: a copy that does not keep times shows them too. A live snapshot
flushes the base just after the overlay was made, hence `GRACE`.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from qchain.chain.layer import Layer
from qchain.hostfile import HostFile

__all__ = ["GRACE", "birth_ns", "older_than_base", "staleness", "tree_staleness"]

GRACE = 60_000_000_000
"""Nanoseconds that a base may be newer than its overlay without a warning."""

_STATX_BTIME = 0x800
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000


def birth_ns(file: HostFile | Path) -> int | None:
    """When the inode was made, in nanoseconds since 1970; None where that is not kept.

    By statx(2), which Python 3.11 does not offer; the layout of its result is part of
    the kernel's interface.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
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
        f"was made ({_when(made)} at the latest): what it reads may be garbage"
    )


def staleness(layers: Sequence[Layer]) -> list[str]:
    """The signs in a chain (active first), one sentence each; empty is good."""
    found = []
    for overlay, base in itertools.pairwise(layers):
        name = overlay.path.name
        written = max(base.file.mtime_ns, base.data.mtime_ns)
        sign = older_than_base(
            overlay.file.mtime_ns, birth_ns(overlay.file), written, base.path.name
        )
        if sign is not None:
            found.append(f"{name}: {sign}")
        if base.size > overlay.size:
            found.append(
                f"{name}: its backing file {base.path.name} is longer ({base.size} bytes) than "
                f"itself ({overlay.size}): perhaps it was resized after this overlay was made"
            )
    return found


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
