"""A look at a range of a file: is it zero, text, random, does a known kind of file begin in it?"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qchain.forensics.newfile import new_file, write_all
from qchain.hostfile import HostFile

__all__ = ["MAX_MAGIC", "Look", "knows_magic", "look_at", "save_range"]

_PIECE = 4 << 20
_SECTOR = 512
_HEAD = 4096
MAX_MAGIC = 1000
"""Beginnings of files that are named in one range."""
_MIN_MAGIC = 4
_MIN_CONFIDENCE = 0.4
_WORDS = re.compile(rb"[ -~]{8,80}")

# Before the library is asked: what it names by one of many programs that use the format, or
# by fewer bytes than it takes not to find it everywhere.
_FIRST = tuple(
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"PK\x03\x04", "ZIP archive (perhaps an office document or a Java program)"),
        (rb"\xff\xd8\xff[\xc0-\xfe]", "JPEG picture"),
        (rb"\x1f\x8b\x08[\x00-\x1f]", "gzip data"),
        (rb"BZh[1-9]1AY&SY", "bzip2 data"),
        (rb"MZ.{58}..[\x00-\x0f]\x00", "DOS or Windows program"),
        (rb"#! ?/[!-~]", "script"),
    )
)
_FIRST_PREFIXES = (b"PK", b"\xff\xd8", b"\x1f\x8b", b"BZ", b"MZ", b"#!")


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


def look_at(
    file: HostFile, start: int, length: int, progress: Callable[[int], None] | None = None
) -> Look:
    """Look at host bytes [start, start + length); what the file does not hold is left out.

    File magic is looked for at every sector of 512 bytes, for there a guest's file may begin;
    most kinds only with the extra `forensics` (`knows_magic`). `progress` is called with the
    bytes that are behind.

    Raises: `DataError` when it cannot be read.
    """
    counts: npt.NDArray[np.int64] = np.zeros(256, np.int64)
    magic: list[tuple[int, str]] = []
    sample = ""
    for offset, data in _data(file, start, length, _SECTOR):
        if progress is not None:
            progress(offset - start)
        if not np.frombuffer(data, np.uint8).any():
            counts[0] += len(data)
            continue
        counts += _histogram(data)
        sample = sample or _words(data)
        for low in _heads(data):
            if len(magic) >= MAX_MAGIC:
                break
            name = _magic_of(data[low : low + _HEAD])
            if name is not None:
                magic.append((offset + low, name))
    counts[0] += max(min(length, file.size - start) - int(counts.sum()), 0)  # the holes
    total = int(counts.sum())
    nonzero = total - int(counts[0])
    shares = counts[counts > 0] / max(total, 1)
    entropy = float(-(shares * np.log2(shares)).sum()) if total else 0.0
    printable = int(counts[32:127].sum() + counts[9:11].sum() + counts[13])
    return Look(nonzero, abs(entropy), printable / max(nonzero, 1), tuple(magic), sample)


def _histogram(data: bytes) -> npt.NDArray[np.int64]:
    """How often each byte occurs. Counted in pairs, which is more than twice as fast."""
    pairs = np.frombuffer(data, np.uint16, len(data) // 2)
    table = np.bincount(pairs, minlength=1 << 16).reshape(256, 256)
    counts: npt.NDArray[np.int64] = table.sum(axis=0) + table.sum(axis=1)
    if len(data) % 2:
        counts[data[-1]] += 1
    return counts


def _heads(data: bytes) -> list[int]:
    """Where in `data` a sector begins as some known kind of file does, by its first bytes."""
    sectors = np.frombuffer(data, np.uint8, len(data) // _SECTOR * _SECTOR)
    first = np.ascontiguousarray(sectors.reshape(-1, _SECTOR)[:, :4])
    long, short = _prefixes()
    hits = np.isin(first.view(np.uint32)[:, 0], long)
    hits |= np.isin(first.view(np.uint16)[:, 0], short)
    found: list[int] = (np.flatnonzero(hits) * _SECTOR).tolist()
    tail = len(sectors)
    return [*found, tail] if tail < len(data) else found


@functools.cache
def _prefixes() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16]]:
    """The first four bytes of what the library knows, the first two of what `_FIRST` does."""
    known: set[bytes] = set()
    if knows_magic():
        from puremagic.main import magic_header_array

        known = {bytes(each.byte_match)[:4] for each in magic_header_array if each.offset == 0}
    # Four equal bytes, zeroes or ones, are no mark of anything.
    long = b"".join(sorted(each for each in known if len(each) == 4 and len(set(each)) > 1))
    return np.frombuffer(long, np.uint32), np.frombuffer(b"".join(_FIRST_PREFIXES), np.uint16)


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
    for pattern, name in _FIRST:
        if pattern.match(head):
            return name
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
        sure = len(magic.strip(b"\0\xff")) >= _MIN_MAGIC and match.confidence >= _MIN_CONFIDENCE
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
