"""Which image format a file is in, by its first bytes, as qemu's probe functions do."""

from __future__ import annotations

from qchain.qcow2.heads import MAGIC

__all__ = ["PROBE_BYTES", "foreign_format", "is_qcow2"]

PROBE_BYTES = 512
"""How many first bytes the functions here look at."""

# (offset, magic, name), names as qemu-img's.
_MAGICS = (
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"QED\0", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    # Not qemu's, but met where images are kept.
    (0, b"EVF\x09\x0d\x0a\xff\x00", "ewf"),
    (0, b"EVF2\x0d\x0a\x81\x00", "ewf"),
    (0, b"AFF10\r\n", "aff"),
    (0, b"MSWIM\0\0\0", "wim"),
)


def is_qcow2(first_bytes: bytes) -> bool:
    """Whether a file starts as qcow2 (version 2 or later; version 1 is another format)."""
    return first_bytes[:4] == MAGIC and int.from_bytes(first_bytes[4:8], "big") >= 2


def foreign_format(first_bytes: bytes, size: int) -> str | None:
    """The name of another image format that a file is in, or None (qcow2, or raw).

    Args:
        first_bytes: at least `PROBE_BYTES`, or the whole file if it is shorter.
        size: of the file in bytes; a file that ends within the magic has none.
    """
    if first_bytes[:4] == MAGIC and int.from_bytes(first_bytes[4:8], "big") == 1:
        return "qcow"
    for offset, magic, name in _MAGICS:
        if offset + len(magic) <= size and first_bytes.startswith(magic, offset):
            return name
    return None
