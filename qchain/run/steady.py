"""Whether the files of a merge are, before each step, as the step before left them.

Locks keep out whoever asks for them. Who does not (a copy over the file, a restore from a
backup, another name put in its place) is seen by the file's identity, length and time.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable

from qchain.chain.layer import Layer
from qchain.chain.scan import identity
from qchain.errors import FailedMidway
from qchain.hostfile import FileId
from qchain.run.journal import LayerRecord

__all__ = ["Steady"]


class Steady:
    """How each file was when it was last looked at: (length in bytes, mtime in nanoseconds)."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._seen: dict[FileId, tuple[int, int]] = {}
        self.note(layers)

    def note(self, layers: Iterable[Layer], only: Collection[FileId | None] | None = None) -> None:
        """They are as they should be now; `only` those, if given, were to change."""
        for layer in layers:
            # The time of a device node says nothing of what is on the device.
            looked_at = layer.file.fd >= 0 and not layer.file.is_block_device
            if looked_at and (only is None or layer.file.id in only):
                self._seen[layer.file.id] = _now(layer)

    def require(self, layers: Iterable[Layer], names: Iterable[LayerRecord]) -> None:
        """Raise `FailedMidway` for a file that was written to, or a name that was given away.

        `names`: those that still lead to the files that they were planned for.
        """
        for layer in layers:
            seen = self._seen.get(layer.file.id)
            if seen is not None and layer.file.fd >= 0 and seen != _now(layer):
                raise FailedMidway(
                    layer.path, "another program has written to it while it was being merged"
                )
        for known in names:
            if identity(known.path) != known.id:
                raise FailedMidway(known.path, "has become another file while it was being merged")


def _now(layer: Layer) -> tuple[int, int]:
    status = os.fstat(layer.file.fd)
    return status.st_size, status.st_mtime_ns
