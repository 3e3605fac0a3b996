"""Opening a chain: from the active image down to its base, through the gate."""

from __future__ import annotations

import os
import resource
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from qchain.chain.gate import Gate, Places
from qchain.chain.layer import Layer, Qcow2Layer, RawLayer, close_layers
from qchain.chain.names import resolve_backing, resolve_name
from qchain.errors import ImageError, NotAllowed, QchainError, Unsupported
from qchain.hostfile import FileId, HostFile
from qchain.qcow2.foreign import foreign_format, is_qcow2
from qchain.qcow2.header import read_header

__all__ = ["Chain", "FormatNotRecorded", "named_format", "open_chain", "open_layer"]

FORMATS = ("qcow2", "raw")


class FormatNotRecorded(ImageError):
    """An overlay does not record its backing file's format, and formats are never probed."""


class MissingFile(ImageError):
    """A backing file that is nowhere."""


@dataclass(frozen=True)
class Chain:
    """The layers of a disk, active first. Closing it closes their files.

    `missing`: the backing file of the last layer, where it is nowhere and the gate lets
    it read as zeroes; every output must say so.
    """

    layers: tuple[Layer, ...]
    missing: Path | None = None

    @property
    def size(self) -> int:
        """The disk's size as the guest sees it, in bytes."""
        return self.layers[0].size

    @property
    def active(self) -> Layer:
        return self.layers[0]

    def close(self) -> None:
        close_layers(self.layers)

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def named_format(file: HostFile, given: str | None) -> str:
    """The format of an image that the user named: as given, else by its magic.

    Raises: `Unsupported` for the magic of another image format: to read it as raw
        would be a guess.
    """
    if given is not None:
        if given not in FORMATS:
            raise Unsupported(file.path, f"format {given!r} is not supported", "use qcow2 or raw")
        return given
    start = file.pread(0, 4096)
    if is_qcow2(start):
        return "qcow2"
    other = foreign_format(start, file.size)
    if other is not None:
        raise Unsupported(
            file.path, f"looks like {other}, not qcow2", "if it is a raw disk, say --format raw"
        )
    return "raw"


def open_layer(
    path: Path, file: HostFile, fmt: str, gate: Gate, named: Path, snapshot: str | None = None
) -> Layer:
    """The layer that `file` is; of its internal snapshot, if one is named.

    Raises `ImageError` when it cannot be read.
    """
    if fmt == "raw":
        if snapshot is not None:
            raise ImageError(path, "a raw image has no internal snapshots", "")
        return RawLayer(path, file)
    if fmt != "qcow2":
        raise Unsupported(path, f"format {fmt!r} is not supported", "only qcow2 and raw are")
    header = read_header(file)
    header.require_readable(path)
    data_file = None
    if header.has_data_file:
        if header.data_file_name is None:
            raise ImageError(path, "it has an external data file but does not name it")
        where = gate.locate(resolve_name(header.data_file_name, path), named)
        data_file = gate.open_referenced(where, named)
    try:
        layer = Qcow2Layer(path, file, header, data_file, snapshot)
        if gate.secret is not None:
            # Imported late: few images are encrypted.
            from qchain.qcow2.luks import read_luks_header, unlock

            luks = read_luks_header(file, header)
            layer.cipher = None if luks is None else unlock(file, luks, gate.secret)
        return layer
    except QchainError:
        if data_file is not None:
            data_file.close()
        raise


def open_chain(
    path: str | os.PathLike[str],
    gate: Gate | None = None,
    fmt: str | None = None,
    snapshot: str | None = None,
    known: Container[FileId] = (),
) -> Chain:
    """Open the image `path` and all that it backs on.

    Args:
        fmt: the format of `path`; by default its magic decides.
        snapshot: an internal snapshot of `path` (name or id) instead of its live content.
        known: files of which the chain is known: with such a one it ends.

    Raises: `ImageError` (missing, invalid, a loop, too deep), `NotAllowed`,
        `FormatNotRecorded`, `Unsupported`. Nothing stays open then.
    """
    path, gate = Path(path), gate or Gate()
    places = Places()
    opened: list[HostFile] = []
    layers: list[Layer] = []
    seen: dict[FileId, Path] = {}
    try:
        file = gate.open_named(path)
        opened.append(file)
        fmt = named_format(file, fmt)
        current = path
        while True:
            if file.id in seen:
                raise _loop(layers[-1], seen[file.id])
            seen[file.id] = current
            layer = open_layer(current, file, fmt, gate, path, None if layers else snapshot)
            layers.append(layer)
            if layer.data is not layer.file:
                opened.append(layer.data)
            if layer.backing is None or file.id in known:
                return Chain(tuple(layers))
            if len(layers) >= gate.max_depth:
                raise ImageError(path, f"the chain is deeper than {gate.max_depth} images")
            _make_room(len(layers))
            below = resolve_backing(layer.backing.name, layer.backing.format, current)
            where = gate.locate(below.path, path, places)
            try:
                file = _open_below(gate, where, path, current, places)
            except MissingFile:
                if gate.missing_zero:
                    return Chain(tuple(layers), missing=where)
                raise
            opened.append(file)
            recorded = below.format or gate.assume_format
            if recorded is None:
                raise FormatNotRecorded(
                    current,
                    f"the format of its backing file {layer.backing.name!r} is not recorded",
                    "say which with --assume-format qcow2|raw (formats are never probed)",
                )
            current, fmt = where, "raw" if recorded in ("file", "host_device") else recorded
    except QchainError:
        for file in opened:
            file.close()
        raise


def _loop(culprit: Layer, above: Path) -> ImageError:
    """The error for a layer whose backing name leads back into the chain, to `above`."""
    name = "" if culprit.backing is None else culprit.backing.name
    where = "itself" if above == culprit.path else f"{above}, above it in the chain"
    return ImageError(
        culprit.path,
        f"the chain loops: its backing name {name[:200]!r} leads back to {where}",
        "record the right backing file with 'qemu-img rebase -u'",
    )


def _open_below(gate: Gate, where: Path, named: Path, overlay: Path, places: Places) -> HostFile:
    try:
        return gate.open_referenced(where, named, places)
    except ImageError as error:
        # Evidence names directories of another machine, which the gate keeps shut.
        elsewhere = (
            gate.missing_zero and isinstance(error, NotAllowed) and not os.path.lexists(where)
        )
        if elsewhere or error.why == "no such file or directory":
            raise MissingFile(
                where,
                f"missing, but {overlay} backs on it",
                "find it (--search DIR), or see 'qchain info' for the overlay alone",
            ) from None
        raise


def _make_room(depth: int) -> None:
    """Raise the limit of open files for chains of hundreds of layers."""
    if depth % 256 == 0:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < 2 * depth + 1024 and soft < hard:
            wanted = 4 * depth + 4096
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (wanted if hard == -1 else min(hard, wanted), hard)
            )
