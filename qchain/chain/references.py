"""Which other files an image refers to, in whatever format and however it says so.

For one who looks for dangers: an image that may read from a file is one that does.
What a chain is opened by, `qchain.chain.names`, is stricter.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qchain.errors import ImageError
from qchain.hostfile import HostFile
from qchain.qcow2.header import read_header
from qchain.qcow2.header_limits import MAX_BACKING_NAME
from qchain.qcow2.heads import MAGIC

__all__ = ["Reference", "references_of", "whereabouts"]

_FIRST_READ = 512
_DATA_FILE = 1 << 2  # incompatible_features
_QED = b"QED\0"
_QED_BACKED = 1 << 0  # features
_VMDK_TEXT = b"# Disk DescriptorFile"
_VMDK_TEXT_SIZE = 65536
_REMOTE = frozenset(
    "ftp ftps gluster http https iscsi nbd nfs rbd sheepdog ssh vxhs".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Reference:
    """A name in an image: `use` says what for ("backs on").

    `beside`: a relative name counts from the image's directory, as backing names do.
    qemu takes names of data files from its working directory.
    """

    name: str
    use: str
    beside: bool = True


def references_of(file: HostFile) -> list[Reference]:
    """The names in qcow2 of any version, QED and VMDK descriptors; one small read for the rest.

    A broken header may still be read by another program: its name counts where it has one.
    Raises: `ImageError` when the file cannot be read.
    """
    start = file.pread(0, _FIRST_READ)
    if start.startswith(MAGIC):
        return _qcow(file, start)
    if start.startswith(_QED):
        # Little-endian: features at 16, offset and size of the name at 56 and 60.
        backed = int.from_bytes(start[16:24], "little") & _QED_BACKED
        offset, size = (int.from_bytes(start[at : at + 4], "little") for at in (56, 60))
        return _backing(file, offset, size) if backed else []
    if start.startswith(_VMDK_TEXT):
        text = os.fsdecode(file.pread(0, _VMDK_TEXT_SIZE))
        found = re.findall(r'^\s*(?:RW|RDONLY)\s.*?"([^"\n]+)"', text, re.MULTILINE)
        return [Reference(name, "is a descriptor of") for name in found]
    return []


def _qcow(file: HostFile, start: bytes) -> list[Reference]:
    # Versions 1, 2 and 3 have the name at the same place.
    offset, size = int.from_bytes(start[8:16], "big"), int.from_bytes(start[16:20], "big")
    out = _backing(file, offset, size)
    version = int.from_bytes(start[4:8], "big")
    if version >= 3 and int.from_bytes(start[72:80], "big") & _DATA_FILE:
        try:
            name = read_header(file).data_file_name
        except ImageError:
            name = None  # qemu does not open it either
        if name is not None:
            out.append(Reference(name, "has its data in", beside=False))
    return out


def _backing(file: HostFile, offset: int, size: int) -> list[Reference]:
    if offset == 0 or not 0 < size <= MAX_BACKING_NAME:
        return []
    name = os.fsdecode(file.pread(offset, size))
    return [Reference(name, "backs on")] if name and "\0" not in name else []


def whereabouts(found: Reference, image: Path) -> Iterator[tuple[Path, bool]]:
    """The local files that a name in `image` may mean, and whether it is sure where they are.

    Where it is not (a relative name that counts from the working directory of whoever
    opens the image) only the last component can be compared.
    """
    name = found.name
    if name.startswith("json:"):
        try:
            filenames = list(_filenames(json.loads(name[5:])))
        except (ValueError, RecursionError):
            return
        for filename in filenames:
            plain = filename.removeprefix("file:")
            if "://" not in plain:
                yield Path(plain), plain.startswith("/")
        return
    protocol, colon, rest = name.partition(":")
    if not colon or "/" in protocol:
        yield image.parent / name, found.beside or name.startswith("/")
    elif protocol.partition("+")[0] not in _REMOTE:
        # file:NAME; blkdebug:CONFIG:NAME and the like end in one.
        yield Path(rest), rest.startswith("/")
        if ":" in rest and protocol != "file":
            yield Path(rest.rpartition(":")[2]), False


def _filenames(value: object) -> Iterator[str]:
    """Whatever stands under a key `filename`, at any depth."""
    if isinstance(value, list):
        for each in value:
            yield from _filenames(each)
    if not isinstance(value, dict):
        return
    for key, each in value.items():
        if isinstance(each, str) and key.rpartition(".")[2] == "filename":
            yield each
        else:
            yield from _filenames(each)
