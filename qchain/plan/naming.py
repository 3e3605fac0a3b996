"""Names that a merge will write: is there room for each?

A header that has no room for a name fails when it is written, and the last ones are
written after the switch, when there is no way back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from qchain.chain.layer import Layer
from qchain.plan.steps import Command, HardLink, NativeCopy, Step
from qchain.qcow2.extensions import BACKING_FORMAT
from qchain.qcow2.header import Header
from qchain.qcow2.header_limits import MAX_BACKING_NAME

__all__ = ["naming_refusals"]

_V2_LENGTH, _V3_LENGTH = 72, 112


def naming_refusals(steps: Sequence[Step], files: Mapping[Path, Layer]) -> list[str]:
    """The headers, and the directories, that cannot hold a name that `steps` give them.

    Args:
        files: which image each path leads to when it is written to.
    """
    out: list[str] = []
    for step in steps:
        match step:
            case Command(argv) if argv[0] == "rebase" and step.writes[0] in files:
                layer = files[step.writes[0]]
                name = os.fsencode(argv[argv.index("-b") + 1])
                if layer.header is not None and len(name) > room(layer.header):
                    out.append(
                        f"{layer.path}: its header has no room for a backing name of "
                        f"{len(name)} bytes, at most {room(layer.header)}; use shorter names, or "
                        "another --strategy or --names"
                    )
            case NativeCopy(image, str(name)) if image in files:
                header = files[image].header
                most = 0 if header is None else new_room(header)
                if len(os.fsencode(name)) > most:
                    out.append(
                        f"{files[image].path}: a new header like its own has no room for a backing "
                        f"name of {len(os.fsencode(name))} bytes, at most {most}; use shorter names"
                    )
            case HardLink(_, link) if len(os.fsencode(link.name)) > _longest(link.parent):
                out.append(
                    f"{link}: this name is too long for its filesystem; use a shorter one for "
                    "the image, or leave out --keep-files"
                )
            case _:
                pass
    return list(dict.fromkeys(out))


def room(header: Header) -> int:
    """Bytes for a backing name: what the first cluster has beside header and extensions.

    Source: qemu's `qcow2_update_header`, which writes the name after the extensions.
    """
    used = max(header.header_length, _V2_LENGTH if header.version == 2 else _V3_LENGTH)
    used += 8  # the end of the extensions
    used += sum(8 + -(-len(each.data) // 8) * 8 for each in header.extensions)
    if not any(each.type == BACKING_FORMAT for each in header.extensions):
        used += 16
    return max(0, min(MAX_BACKING_NAME, header.cluster_size - used))


def new_room(header: Header) -> int:
    """The same of a new file with its features, written by the native engine."""
    used = (_V2_LENGTH if header.version == 2 else _V3_LENGTH) + 16 + 8
    return max(0, min(MAX_BACKING_NAME, header.cluster_size - used))


def _longest(directory: Path) -> int:
    """The longest file name that a directory can hold, in bytes."""
    try:
        return os.pathconf(directory, "PC_NAME_MAX")
    except (OSError, ValueError):
        return 255
