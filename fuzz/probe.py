"""One image read in every way that the library has: only `QchainError` may come out of it.

Work is bounded where the library lets its caller bound it (windows of a map, bytes read); what has
no such bound must itself be quick.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qchain.chain.chain import Chain, open_chain
from qchain.chain.counts import count_clusters, owned_by_region
from qchain.chain.extents import joined_runs
from qchain.chain.gate import Gate
from qchain.chain.layer import Qcow2Layer
from qchain.chain.ownership import ownership
from qchain.chain.reader import read
from qchain.chain.tree import read_tree
from qchain.errors import QchainError
from qchain.forensics.unused import unused_ranges
from qchain.hostfile import HostFile
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.qcow2.bitmaps import dirty_ranges, read_bitmaps
from qchain.qcow2.check import check_image
from qchain.qcow2.entries import Kind
from qchain.qcow2.header import Header, read_header
from qchain.qcow2.luks import read_luks_header
from qchain.qcow2.refcounts import read_refcount
from qchain.qcow2.snapshots import read_snapshots
from qchain.verify.compare import compare

__all__ = ["NotOneLine", "Probe", "probe"]

_TABLES = 4  # windows of a map
_READ = 64 << 10  # bytes read at once
_RANGES = 1000  # of a bitmap
_POINTS = 2  # snapshots read
_ITERATIONS = 50_000  # of PBKDF2 that an unlocking may cost
T = TypeVar("T")
_FIELDS = [name for name in dir(Header) if not name.startswith("_")]


class NotOneLine(Exception):
    """An error that would not be one printable line."""


@dataclass(frozen=True)
class Probe:
    """How far one image was read: `opened` whether its chain was."""

    opened: bool
    errors: int


def probe(image: Path, number: int = 0, secret: bytes | None = None) -> Probe:
    """Read `image` and what it backs on. Whatever is raised here is a find.

    Args:
        number: chooses what is done to one in a few images only.
    """
    tries = _Tries()
    gate = Gate(
        follow=number % 3 == 0,
        assume_format=(None, "raw", "qcow2")[number % 5 % 3],
        missing_zero=number % 4 == 0,
        search=(image.parent,) if number % 16 == 5 else (),
        secret=secret if number % 8 == 0 and secret is not None and _cheap(image) else None,
    )
    tries(lambda: _describe(image, tries, points=number % 2 == 0))
    chain = tries(lambda: open_chain(image, gate))
    if chain is not None:
        with chain:
            _read_chain(chain, tries)
            if number % 4 == 1:
                tries(lambda: make_plan(chain, Request(flatten=True)).as_json())
            if number % 16 == 2:
                tries(lambda: owned_by_region(chain.layers, 60))
            if number % 16 == 6:
                below = chain.layers[1:] or chain.layers
                if all(layer.size <= 1 << 26 for layer in chain.layers):
                    tries(lambda: compare(chain.layers, below))
    if number % 16 == 10:
        tries(lambda: read_tree([image.parent]))
    return Probe(chain is not None, tries.errors)


class _Tries:
    """Calls that may fail, but only as the library says it does."""

    def __init__(self) -> None:
        self.errors = 0

    def __call__(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except QchainError as error:
            self.errors += 1
            if not str(error).isprintable():
                raise NotOneLine(repr(str(error))) from error
            return None


def _describe(image: Path, tries: _Tries, points: bool) -> None:
    """All that one file says of itself. `points`: its snapshots are read too."""
    with HostFile(image) as file:
        header = read_header(file)
        for name in _FIELDS:
            getattr(header, name)
        if not all(text.isprintable() for text in (*header.problems, *header.warnings)):
            raise NotOneLine(f"{header.problems} {header.warnings}")
        found = tries(lambda: read_snapshots(file, header)) or []
        for each in found[: _POINTS * points]:
            tries(lambda point=each.id or each.name: _point(image, point, tries))  # type: ignore[misc]
        for bitmap in (tries(lambda: read_bitmaps(file, header)) or [])[:_POINTS]:
            ranges = dirty_ranges(file, header, bitmap)
            tries(lambda some=ranges: list(itertools.islice(some, _RANGES)))  # type: ignore[misc]
        luks = tries(lambda: read_luks_header(file, header))
        if luks is not None:
            luks.as_json()
        tries(lambda: read_refcount(file, header, file.size // max(1, header.cluster_size)))
        report = tries(lambda: check_image(file, header, limit=50))
        if report is not None and header.cluster_size:
            tries(lambda: unused_ranges(file, header, report.leaked))
        header.require_readable(image)
        count_clusters(Qcow2Layer(image, file, header, file if header.has_data_file else None))


def _point(image: Path, name: str, tries: _Tries) -> None:
    with open_chain(image, Gate(), snapshot=name) as chain:
        _read_chain(chain, tries)


def _read_chain(chain: Chain, tries: _Tries) -> None:
    """Who owns what, the beginning of the map, and some bytes: first, last, and of the map."""
    layers = chain.layers
    tries(lambda: ownership(layers))
    tables = tries(lambda: list(itertools.islice(joined_runs(layers), _TABLES))) or []
    places = {0, max(0, chain.size - _READ)}
    for table in tables:
        stored = (table.kind == Kind.DATA) | (table.kind == Kind.COMPRESSED)
        places.update(table.start[stored][:3].tolist())
        list(itertools.islice(table.extents(), 100))
    for start in sorted(places)[:5]:
        tries(lambda at=start: read(layers, at, _READ))  # type: ignore[misc]


def _cheap(image: Path) -> bool:
    """Whether to try a passphrase costs little: a header may ask for hours of it, and says so."""
    try:
        with HostFile(image) as file:
            luks = read_luks_header(file, read_header(file))
    except QchainError:
        return False
    if luks is None:
        return True
    asked = luks.digest_iterations + sum(slot.iterations for slot in luks.slots if slot.active)
    return asked <= _ITERATIONS
