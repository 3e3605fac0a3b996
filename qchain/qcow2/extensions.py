"""Header extensions: the area behind the header, and what is known of it.

Source: the qcow2 specification, "Header extensions"; the limits are those of
qemu's `qcow2_read_extensions`. Every length is checked against the area, and
the number of extensions and names kept is bounded, whatever the image says.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import NamedTuple

from qchain.qcow2.findings import Finding, Level
from qchain.qcow2.heads import (
    BITMAPS_EXTENSION,
    EXTENSION_HEAD,
    FEATURE_NAME,
    LUKS_POINTER,
    BitmapsExtension,
    LuksPointer,
    extension_head,
    feature_name,
)

__all__ = [
    "EXTENSION_NAMES",
    "MAX_BITMAPS",
    "MAX_BITMAP_DIRECTORY",
    "BitmapsExtension",
    "Extension",
    "Extensions",
    "LuksPointer",
    "text_of",
]

BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
BITMAPS = 0x23852875
LUKS = 0x0537BE77
DATA_FILE = 0x44415441

EXTENSION_NAMES = {
    BACKING_FORMAT: "backing format",
    FEATURE_NAMES: "feature names",
    BITMAPS: "bitmaps",
    LUKS: "LUKS header",
    DATA_FILE: "data file name",
}
"""What each type that we know holds. Others are kept as they are."""

# qemu writes at most six. A 2 MiB cluster full of empty ones would cost seconds.
_MAX_EXTENSIONS = 1024
# Three bitmaps of 64 bits: more names than bits are of no use.
_MAX_FEATURE_NAMES = 192
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY = 1024 * MAX_BITMAPS


class Extension(NamedTuple):
    """One extension as it lies in the file, padding removed."""

    type: int
    data: bytes


@dataclass(slots=True)
class Extensions:
    """All extensions of one header, those known decoded, and what is wrong with them."""

    all: list[Extension] = field(default_factory=list)
    backing_format: str | None = None
    data_file_name: str | None = None
    feature_names: dict[tuple[int, int], str] = field(default_factory=dict)
    bitmaps: BitmapsExtension | None = None
    luks: LuksPointer | None = None
    findings: list[Finding] = field(default_factory=list)

    def _invalid(self, text: str) -> None:
        self.findings.append(Finding(text, Level.INVALID))

    def read(self, area: bytes, start: int, end: int) -> int:
        """Walk the extensions within [start, end).

        Args:
            area: the first bytes of the file, up to `end` or the end of the file; what
                the file does not hold reads as zeroes, as in qemu.
            start: end of the header.
            end: start of the backing file name, or end of the first cluster.

        Returns: how far it looked. If that is beyond `area`, and the file is longer,
            the walk has to be repeated with more of it.
        """
        position = start
        while position < end:
            reached = position + EXTENSION_HEAD
            kind, length = extension_head(area[position:reached].ljust(EXTENSION_HEAD, b"\0"))
            if kind == 0 and length == 0:
                return reached
            if length > end - reached:
                self._invalid(
                    f"header extension {kind:#010x} at offset {position} "
                    f"runs out of its area, which ends at {end}"
                )
                return reached
            position = reached
            if kind == 0:
                return reached
            reached += length
            data = area[position:reached]
            if len(data) < length:
                self._invalid(f"header extension {kind:#010x} ends beyond the file")
                return reached
            if len(self.all) == _MAX_EXTENSIONS:
                self._invalid(f"more than {_MAX_EXTENSIONS} header extensions")
                return reached
            self.all.append(Extension(kind, data))
            position += -(-length // 8) * 8
        return position

    def decode(self, *, cluster_size: int, crypt_method: int, bitmaps_valid: bool) -> None:
        """Decode those that are known. `bitmaps_valid`: the autoclear bit of bitmaps."""
        for kind, data in self.all:
            if kind == BACKING_FORMAT:
                if len(data) >= 16:
                    self._invalid(f"backing format name of {len(data)} bytes, more than 15")
                else:
                    self.backing_format = text_of(data) or None
            elif kind == DATA_FILE:
                self.data_file_name = text_of(data) or None
            elif kind == FEATURE_NAMES:
                self._decode_feature_names(data)
            elif kind == LUKS:
                self._decode_luks(data, cluster_size, crypt_method)
            elif kind == BITMAPS:
                self._decode_bitmaps(data, cluster_size, bitmaps_valid)

    def _decode_feature_names(self, data: bytes) -> None:
        count = min(len(data) // FEATURE_NAME, _MAX_FEATURE_NAMES)
        for start in range(0, count * FEATURE_NAME, FEATURE_NAME):
            kind, bit, padded = feature_name(data[start : start + FEATURE_NAME])
            name = padded.split(b"\0")[0].decode("utf-8", "replace")
            self.feature_names.setdefault((kind, bit), name)

    def _decode_luks(self, data: bytes, cluster_size: int, crypt_method: int) -> None:
        if crypt_method != 2:
            self._invalid("pointer to a LUKS header, but the encryption is not LUKS")
        elif len(data) != LUKS_POINTER:
            self._invalid(f"LUKS header extension of {len(data)} bytes, 16 are right")
        else:
            self.luks = LuksPointer.parse(data)
            if self.luks.offset % cluster_size:
                self._invalid(f"LUKS header offset {self.luks.offset} is not cluster-aligned")

    def _decode_bitmaps(self, data: bytes, cluster_size: int, valid: bool) -> None:
        if len(data) != BITMAPS_EXTENSION:
            self._invalid(f"bitmaps extension of {len(data)} bytes, 24 are right")
            return
        if not valid:
            # A program that does not know bitmaps wrote to the image: they are stale.
            self.findings.append(
                Finding("bitmaps are stale: their autoclear bit is not set", Level.WARNING)
            )
            return
        entry = self.bitmaps = BitmapsExtension.parse(data)
        if entry.reserved:
            self._invalid("reserved field of the bitmaps extension is not zero")
        if not 1 <= entry.nb_bitmaps <= MAX_BITMAPS:
            self._invalid(f"{entry.nb_bitmaps} bitmaps, not 1 to {MAX_BITMAPS}")
        if entry.directory_offset % cluster_size:
            self._invalid(
                f"bitmap directory offset {entry.directory_offset} is not cluster-aligned"
            )
        if entry.directory_size > MAX_BITMAP_DIRECTORY:
            self._invalid(f"bitmap directory of {entry.directory_size} bytes is too large")


def text_of(raw: bytes) -> str:
    """A name as qemu takes it: up to the first NUL, any bytes kept (`os.fsencode` gives them)."""
    return os.fsdecode(raw.split(b"\0")[0])
