"""`qchain info`: everything that one file says of itself; its backing file is never opened."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qchain.errors import ImageError, Unsupported, UsageError

from .options import Common, command
from .output import absolute, write, write_json

if TYPE_CHECKING:
    from qchain.hostfile import HostFile
    from qchain.qcow2.header import Header

__all__ = ["info"]


_SHOWN = 1024
"""Bytes of a header extension that are shown; an image may fill its first cluster with one."""


@dataclass
class _Description:
    """What was found so far; `error` is the first thing that stopped the reading."""

    fields: dict[str, Any]
    readable: bool = False
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: ImageError | None = None

    def failed(self, error: ImageError) -> None:
        self.error = self.error or error
        if error.why not in self.problems:
            self.problems.append(error.why)

    def as_json(self) -> dict[str, Any]:
        return self.fields | {
            "readable": self.readable,
            "problems": self.problems,
            "warnings": self.warnings,
        }


@command
def info(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image.")],
    common: Common,
    bitmap: Annotated[
        str | None,
        typer.Option("--bitmap", metavar="NAME", help="Also list the dirty ranges of this one."),
    ] = None,
) -> None:
    """Describe one image: format, sizes, snapshots, clusters and more."""
    from qchain.chain.scan import unfinished_of

    from .opening import tell_unfinished, unfinished_field

    found = _Description(_nothing(image))
    try:
        _describe(image, common, bitmap, found)
    except ImageError as error:
        found.readable = False
        found.failed(error)
    journals = unfinished_of([image])
    if common.json:
        write_json(found.as_json() | unfinished_field(journals))
    else:
        write(_text(image, found.as_json()))
        tell_unfinished(journals)
    if found.error is not None:
        # The reader of this line is already looking at what 'info' can tell.
        todo = "" if found.error.todo == ImageError.todo else found.error.todo
        raise type(found.error)(found.error.what, found.error.why, todo)


def _nothing(image: Path) -> dict[str, Any]:
    """The fields of an image of which nothing is known yet."""
    return {
        "path": absolute(image),
        "format": None,
        "version": None,
        "virtual_size": None,
        "cluster_size": None,
        "file_size": None,
        "disk_size": None,
        "backing": None,
        "features": {"incompatible": [], "compatible": [], "autoclear": []},
        "encryption": None,
        "luks": None,
        "data_file": None,
        "compression": None,
        "extended_l2": False,
        "refcount_bits": None,
        "extensions": [],
        "snapshots": [],
        "bitmaps": [],
        "clusters": None,
    }


def _describe(image: Path, common: Common, bitmap: str | None, found: _Description) -> None:
    from qchain.chain.chain import named_format
    from qchain.qcow2.foreign import foreign_format

    from .opening import refuse_writer

    with common.gate().open_named(image) as file:
        found.fields |= {"file_size": file.size, "disk_size": file.disk_size}
        if not common.force_share:
            refuse_writer(image, file)
        try:
            fmt = named_format(file, common.format)
        except Unsupported:
            found.fields["format"] = common.format or foreign_format(file.pread(0, 4096), file.size)
            raise
        found.fields["format"] = fmt
        if fmt == "raw":
            if bitmap is not None:
                raise UsageError("--bitmap", "a raw image has no bitmaps", "leave it out")
            found.fields["virtual_size"] = -(-file.size // 512) * 512
            found.readable = True
        else:
            _describe_qcow2(image, file, common, bitmap, found)


def _describe_qcow2(
    image: Path, file: HostFile, common: Common, bitmap: str | None, found: _Description
) -> None:
    from qchain.qcow2.header import read_header
    from qchain.qcow2.snapshots import read_snapshots

    header = read_header(file)
    found.fields |= _header_fields(header)
    found.problems += header.problems
    found.warnings += header.warnings
    found.readable = header.readable
    try:
        found.fields["snapshots"] = [asdict(entry) for entry in read_snapshots(file, header)]
    except ImageError as error:
        found.failed(error)
    try:
        _describe_bitmaps(file, header, bitmap, found)
    except ImageError as error:
        found.failed(error)
    if header.encryption == "luks":
        try:
            _describe_luks(file, header, found)
        except ImageError as error:
            found.failed(error)
    header.require_readable(image)
    try:
        _count(image, file, header, common, found)
    except ImageError:
        found.readable = False
        raise


def _describe_bitmaps(
    file: HostFile, header: Header, wanted: str | None, found: _Description
) -> None:
    from qchain.qcow2.bitmaps import dirty_ranges, find_bitmap, read_bitmaps

    found.fields["bitmaps"] = [
        {"name": entry.name, "granularity": entry.granularity, "flags": list(entry.flags)}
        for entry in read_bitmaps(file, header)
    ]
    if wanted is None:
        return
    entry = find_bitmap(file, header, wanted)
    if entry.in_use:
        found.warnings.append(f"bitmap {wanted!r} is in use: what it marks here is out of date")
    found.fields["dirty"] = [
        {"start": start, "length": length} for start, length in dirty_ranges(file, header, entry)
    ]


def _describe_luks(file: HostFile, header: Header, found: _Description) -> None:
    from qchain.qcow2.luks import read_luks_header

    luks = read_luks_header(file, header)
    found.fields["luks"] = None if luks is None else luks.as_json()


def _count(
    image: Path, file: HostFile, header: Header, common: Common, found: _Description
) -> None:
    from qchain.chain.counts import count_clusters
    from qchain.chain.layer import Qcow2Layer

    # Only the map is read: the image itself stands for a data file that is not opened.
    layer = Qcow2Layer(image, file, header, file if header.has_data_file else None)
    with common.reporter() as reporter:
        reporter.step("counting clusters", layer.size)
        counts = count_clusters(layer, reporter.advance)
    found.fields["clusters"] = asdict(counts)
    if counts.beyond:
        found.problems.append(
            f"the data of {counts.beyond} cluster(s) lies beyond the end of the file and reads as "
            "zeroes: the file seems cut short"
        )
    if counts.invalid:
        raise ImageError(image, f"{counts.invalid} L2 entries break the format")


def _header_fields(header: Header) -> dict[str, Any]:
    from qchain.qcow2.extensions import EXTENSION_NAMES

    backing = None
    if header.backing_name is not None:
        backing = {"name": header.backing_name, "format": header.backing_format}
    return {
        "version": header.version,
        "virtual_size": header.size,
        "cluster_size": header.cluster_size,
        "backing": backing,
        "features": {
            "incompatible": header.incompatible_names,
            "compatible": header.compatible_names,
            "autoclear": header.autoclear_names,
        },
        "encryption": header.encryption,
        "data_file": header.data_file_name,
        "compression": header.compression,
        "extended_l2": header.extended_l2,
        "refcount_bits": header.refcount_bits,
        "extensions": [
            {
                "type": f"{each.type:#010x}",
                "name": EXTENSION_NAMES.get(each.type),
                "length": len(each.data),
                "data": each.data[:_SHOWN].hex(),
            }
            for each in header.extensions
        ],
    }


def _text(image: Path, found: dict[str, Any]) -> str:
    from .tables import facts

    rows = [("image", str(image)), ("format", _format_text(found))]
    rows += _size_rows(found)
    if found["backing"] is not None:
        fmt = found["backing"]["format"] or "format not recorded"
        rows.append(("backing file", f"{found['backing']['name']} ({fmt})"))
    rows.append(("data file", found["data_file"] or ""))
    rows.append(("encryption", _encryption_text(found)))
    for kind, names in found["features"].items():
        rows.append((f"{kind} features", ", ".join(names)))
    rows += [
        ("extension", f"{each['type']} (unknown), {each['length']} bytes: {each['data'][:64]}")
        for each in found["extensions"]
        if each["name"] is None
    ]
    rows += _entry_rows(found)
    rows += [("problem", text) for text in found["problems"]]
    rows += [("note", text) for text in found["warnings"]]
    if not found["readable"]:
        rows.append(("readable", "no"))
    return facts(rows)


def _format_text(found: dict[str, Any]) -> str:
    if found["version"] is None:
        return found["format"] or "unknown"
    parts = [
        f"qcow2 version {found['version']}",
        f"{found['compression']} compression",
        f"{found['refcount_bits']}-bit refcounts",
    ]
    return ", ".join([*parts, "extended L2"] if found["extended_l2"] else parts)


def _encryption_text(found: dict[str, Any]) -> str:
    luks = found["luks"]
    if luks is None:
        return found["encryption"] or ""
    slots = ", ".join(str(each["slot"]) for each in luks["key_slots"])
    return f"LUKS version {luks['version']}, {luks['cipher']}, {luks['mode']}, key slots: {slots}"


def _size_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from .tables import size_text

    names = ("virtual_size", "file_size", "disk_size", "cluster_size")
    rows = [
        (name.replace("_", " "), f"{size_text(found[name])} ({found[name]:,} bytes)")
        for name in names
        if found[name] is not None
    ]
    counts = found["clusters"]
    if counts is not None:
        parts = [
            f"{counts[name]:,} {name}"
            for name in ("data", "zero", "compressed", "unallocated", "invalid")
            if counts[name]
        ]
        rows.append(("clusters", f"{counts['total']:,}: {', '.join(parts) or 'none'}"))
    return rows


def _entry_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from .tables import size_text

    rows = []
    for entry in found["snapshots"]:
        text = f"{entry['id']} {entry['name']}, disk of {size_text(entry['disk_size'])}"
        if entry["vm_state_size"]:
            text += f", VM state of {size_text(entry['vm_state_size'])}"
        rows.append(("snapshots", f"{text}, taken {_date(entry['date_sec'])}"))
    for entry in found["bitmaps"]:
        flags = "".join(f", {flag}" for flag in entry["flags"])
        rows.append(("bitmaps", f"{entry['name']}, one bit for {entry['granularity']}{flags}"))
    for each in found.get("dirty", ()):
        rows.append(("dirty", f"{each['length']:,} bytes from {each['start']}"))
    return rows


def _date(seconds: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
