"""Everything a report says of a chain, as plain values; `qchain.forensics.page` makes it HTML."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import numpy.typing as npt

from qchain.chain.chain import Chain
from qchain.chain.counts import owned_by_region
from qchain.chain.layer import Layer
from qchain.chain.ownership import Ownership, ownership
from qchain.errors import ImageError
from qchain.forensics.look import Look, look_at
from qchain.forensics.seal import make_seal
from qchain.forensics.staleness import relocated, staleness
from qchain.forensics.unused import UnusedRange, unused_ranges
from qchain.qcow2.bitmaps import Bitmap, read_bitmaps
from qchain.qcow2.check import Severity, check_image
from qchain.qcow2.snapshots import Snapshot, read_snapshots

__all__ = ["REGIONS", "LayerReport", "Report", "collect", "date_text"]

REGIONS = 120
"""Parts of the disk in the map of ownership."""
_FINDINGS = 200

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class LayerReport:
    """One layer; sizes in bytes. `digest`, `data_digest`: SHA-256 of its file and of its
    external data file, where they were wanted. `unused`: what nothing in the file refers to."""

    name: str
    path: str
    format: str
    virtual_size: int
    file_size: int
    disk_size: int
    cluster_size: int | None
    details: str
    allocated: int
    owned: int
    shadowed: int
    backing: str | None
    changed: str
    digest: str | None = None
    data_path: str | None = None
    data_digest: str | None = None
    snapshots: list[Snapshot] = field(default_factory=list)
    bitmaps: list[Bitmap] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unused: list[tuple[UnusedRange, Look | None]] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """A chain, active layer first. `shares`: shape (layers, REGIONS), bytes owned.

    `digest`: SHA-256 of the guest-visible content (None: not wanted, or not readable).
    `missing`: the backing file of the last layer, where it is missing and taken for zeroes.
    """

    image: str
    virtual_size: int
    layers: list[LayerReport]
    shares: npt.NDArray[np.float64]
    digest: str | None
    missing: str | None
    warnings: list[str]
    notes: list[str]
    tool: str
    command: str
    made: str


def collect(
    chain: Chain,
    command: str,
    digests: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Read all that a report says.

    Args:
        command: the exact command that asked for it, quoted for a shell.
        digests: also digest every file and the point, and look at what nothing refers to:
            that reads everything.

    Raises: `ImageError` when the maps cannot be read; lesser problems are in the result.
    """
    warnings = staleness(chain.layers)
    if chain.missing is not None:
        warnings.insert(0, f"{chain.missing}: missing, taken for zeroes (--missing zero)")
    layers = [
        _layer(layer, own, digests)
        for layer, own in zip(chain.layers, ownership(chain.layers), strict=True)
    ]
    point = None
    if digests:
        try:
            seal = make_seal(chain, progress)
        except ImageError as error:
            warnings.append(f"no digests: {error}")
        else:
            point = seal["point"]["sha256"]
            if seal["unreadable"] is not None:
                warnings.append(f"no digest of what the guest sees: {seal['unreadable']}")
            for found, sealed in zip(layers, seal["layers"], strict=True):
                found.digest = sealed["sha256"]
                if "data_file" in sealed:
                    found.data_digest = sealed["data_file"]["sha256"]
    return Report(
        image=os.path.abspath(chain.active.path),
        virtual_size=chain.size,
        layers=layers,
        shares=owned_by_region(chain.layers, REGIONS),
        digest=point,
        missing=None if chain.missing is None else str(chain.missing),
        warnings=warnings,
        notes=relocated(chain.layers),
        tool=f"qchain {version('qchain')}",
        command=command,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def _layer(layer: Layer, own: Ownership, look: bool) -> LayerReport:
    header = layer.header
    details = []
    if header is not None:
        details = [f"version {header.version}", f"{header.refcount_bits}-bit refcounts"]
        details += [header.compression, *header.incompatible_names, *header.compatible_names]
        details += header.autoclear_names
        details += [f"encryption {header.encryption}"] if header.encryption else []
    backing = layer.backing
    found = LayerReport(
        name=layer.path.name,
        path=os.path.abspath(layer.path),
        format=layer.format,
        virtual_size=layer.size,
        file_size=layer.file.size,
        disk_size=layer.file.disk_size,
        cluster_size=None if header is None else header.cluster_size,
        details=", ".join(details),
        allocated=own.allocated,
        owned=own.owned,
        shadowed=own.shadowed,
        backing=None if backing is None else f"{backing.name} ({backing.format or 'no format'})",
        changed=date_text(layer.file.mtime_ns / 1e9),
        data_path=None if layer.data is layer.file else os.path.abspath(layer.data.path),
    )
    if header is not None:
        _inspect(layer, found, look)
    return found


def _inspect(layer: Layer, found: LayerReport, look: bool) -> None:
    """Snapshots, bitmaps, problems and unused space of a qcow2 layer; what cannot be read is
    a problem."""
    header = layer.header
    assert header is not None
    found.problems += header.problems
    found.warnings += header.warnings
    try:
        found.snapshots = read_snapshots(layer.file, header)
    except ImageError as error:
        found.problems.append(error.why)
    try:
        found.bitmaps = read_bitmaps(layer.file, header)
    except ImageError as error:
        found.problems.append(error.why)
    try:
        check = check_image(layer.file, header)
        unused = unused_ranges(layer.file, header, check.leaked)
        found.unused = [
            (each, look_at(layer.file, each.start, each.length) if look else None)
            for each in unused[:_FINDINGS]
        ]
    except ImageError as error:
        found.problems.append(f"cannot be checked: {error.why}")
        return
    shown = check.problems[:_FINDINGS]
    for each in shown:
        text = f"at {each.offset}: {each.meaning}"
        bad = each.severity is Severity.CORRUPTION
        (found.problems if bad else found.warnings).append(text)
    more = sum(check.counts.values()) - len(shown)
    if more > 0:
        found.warnings.append(f"{more} more findings: see 'qchain check'")
    if len(unused) > _FINDINGS:
        rest = len(unused) - _FINDINGS
        found.warnings.append(f"{rest} more ranges that nothing refers to: see 'qchain leaks'")


def date_text(seconds: float) -> str:
    """A time in seconds since 1970, for a person."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.0f} s since 1970"
