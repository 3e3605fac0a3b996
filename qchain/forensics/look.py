"""A look at a range of a file: is it zero, text, random, does a known kind of file begin in it?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qchain.forensics.newfile import new_file, write_all
from qchain.hostfile import HostFile

__all__ = ["Look", "knows_magic", "look_at", "save_range"]

_PIECE = 4 << 20
_HEAD = 4096
MAX_HEADS = 4096
"""Clusters of one range in which the beginning of a file is looked for."""
_MIN_MAGIC = 4
_MIN_CONFIDENCE = 0.4
_WORDS = re.compile(rb"[ -~]{8,80}")


@dataclass(frozen=True, slots=True)
class Look:
    """`nonzero`: bytes that are not zero. `entropy`: bits per byte over the whole range,
    0 to 8. `text`: share of the non-zero bytes that are printable ASCII or white space.
    `magic`: (offset in the file, what begins there). `sample`: the first readable words."""

    nonzero: int
    entropy: float
    text: float
    magic: tuple[tuple[int, str], ...]
    sample: str

    @property
    def zero(self) -> bool:
        return self.nonzero == 0

    @property
    def summary(self) -> str:
        """One word for a person: 'zero', 'text', 'random or compressed', or 'data'."""
        if self.zero:
            return "zero"
        if self.text > 0.95:
            return "text"
        return "random or compressed" if self.entropy > 7.9 else "data"


def look_at(file: HostFile, start: int, length: int, cluster_size: int) -> Look:
    """Look at host bytes [start, start + length); what the file does not hold is left out.

    File magic is looked for at every `cluster_size` bytes, for there a guest's file may begin;
    without the extra `forensics` it is not looked for (`knows_magic`).

    Raises: `DataError` when it cannot be read.
    """
    counts: npt.NDArray[np.int64] = np.zeros(256, np.int64)
    magic: list[tuple[int, str]] = []
    sample = ""
    heads = 0
    for offset, data in _data(file, start, length, cluster_size):
        found = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        counts += found
        if found[0] == len(data):
            continue
        sample = sample or _words(data)
        for low in range(0, len(data), cluster_size):
            head = data[low : low + _HEAD]
            if heads < MAX_HEADS and any(head[:512]):
                heads += 1
                name = _magic_of(head)
                if name is not None:
                    magic.append((offset + low, name))
    counts[0] += max(min(length, file.size - start) - int(counts.sum()), 0)  # the holes
    total = int(counts.sum())
    nonzero = total - int(counts[0])
    shares = counts[counts > 0] / max(total, 1)
    entropy = float(-(shares * np.log2(shares)).sum()) if total else 0.0
    printable = int(counts[32:127].sum() + counts[9:11].sum() + counts[13])
    return Look(nonzero, abs(entropy), printable / max(nonzero, 1), tuple(magic), sample)


def knows_magic() -> bool:
    """Whether the package that knows file magic is installed (extra `forensics`)."""
    return find_spec("puremagic") is not None


def _data(file: HostFile, start: int, length: int, unit: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of what is no hole, in pieces that begin at multiples of `unit`."""
    step = max(_PIECE // unit, 1) * unit
    position = start
    for low, high in file.data_ranges(start, start + length):
        low = max(position, start + (low - start) // unit * unit)
        high = min(start + -(-(high - start) // unit) * unit, start + length)
        for position in range(low, high, step):
            yield position, file.pread(position, min(step, high - position))
        position = max(position, high)


def _magic_of(head: bytes) -> str | None:
    """What kind of file begins like this; None if nothing is sure enough."""
    found: list[Any]
    try:
        import puremagic

        found = puremagic.magic_string(head)
    except ImportError:
        return None
    except Exception:
        # It parses what it recognises, and any error of that means: not recognised.
        return None
    for match in found:
        magic = bytes(match.byte_match or b"")
        sure = len(magic.strip(b"\0")) >= _MIN_MAGIC and match.confidence >= _MIN_CONFIDENCE
        if sure and match.offset == 0:
            return str(match.name)
    return None


def _words(data: bytes) -> str:
    """The first run of at least eight printable characters, at most 80 of it."""
    found = _WORDS.search(data)
    return found[0].decode("ascii") if found else ""


def save_range(file: HostFile, start: int, length: int, output: Path) -> None:
    """Copy host bytes into the new file `output`, sparse where the image is.

    Raises: as `qchain.forensics.newfile.new_file`; `DataError` when it cannot be read.
    """
    with new_file(output) as stream:
        for offset, data in _data(file, start, length, 4096):
            if any(data):
                stream.seek(offset - start)
                write_all(stream, data)
        stream.truncate(length)
