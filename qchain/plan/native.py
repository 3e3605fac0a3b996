"""What the native engine's ways of merging a group cost: counted by doing them without writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.errors import ImageError
from qchain.native.inplace import Place, measured_append
from qchain.native.mover import Moved
from qchain.native.newfile import measured_new_file
from qchain.native.newheader import Tables, switched_header
from qchain.plan.amounts import Traffic
from qchain.plan.bitmaps import fate_of, has_bitmaps
from qchain.plan.growth import Growth
from qchain.plan.model import TimeModel
from qchain.plan.names import absolute_name, backing_name
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Group
from qchain.qcow2.bitmaps import read_bitmaps

__all__ = ["NativeCost", "costs_of", "no_native"]

_FEW = 4
"""Of groups of more images only the likely targets are counted."""


@dataclass(frozen=True, slots=True)
class NativeCost:
    """What is done, all data being copied, and by how many bytes the target grows (of a new
    file: its length). `reason`: why it could not be counted; None if it could."""

    target: int | None
    moved: Moved
    grows: int
    reason: str | None = None

    def seconds(self, files: int, model: TimeModel) -> float:
        """The estimate; where extents are shared it takes less."""
        moved = self.moved
        told = model.seconds(
            read=moved.copied,
            written=moved.copied + moved.written,
            requests=moved.calls,
            serial_requests=0,
            files=files,
            commands=0,
        )
        return round(told, 3)

    def traffic(self, counted: Traffic) -> Traffic:
        """`counted` by the maps, with the amounts of this engine."""
        return Traffic(
            copy_bytes=self.moved.copied if self.target is None else 0,
            pull_bytes=0 if self.target is None else self.moved.copied,
            extents=self.moved.calls,
            held_bytes=counted.held_bytes,
            shown_bytes=counted.shown_bytes,
        )

    def growth(self, layer: Layer) -> Growth:
        """All that comes goes to the end; what the old tables held is free only afterwards."""
        assert isinstance(layer, Qcow2Layer)
        end = layer.file.size + self.grows
        clusters = self.grows >> layer.cluster_bits
        # The old tables are given back, and what they alone named.
        return Growth(clusters, 0, end, end, self.grows)


def costs_of(layers: Sequence[Layer], group: Group, counted: Sequence[Traffic]) -> list[NativeCost]:
    """The targets of the group, from the kept image down, and the new file last.

    Args:
        counted: the traffic of every target.
    """
    line = [layers[index] for index in group.line]
    members, below = line[: group.count], line[group.count :]
    shown = [traffic.shown_bytes for traffic in counted]
    likely = {0, group.count - 1, shown.index(max(shown))}
    out = []
    for position in range(group.count):
        if position in likely or group.count <= _FEW:
            out.append(_cost(members, below, position, group.line[position]))
    out.append(_cost(members, below, None, None))
    return out


def _cost(
    members: Sequence[Layer], below: Sequence[Layer], position: int | None, target: int | None
) -> NativeCost:
    layer = members[0 if position is None else position]
    reason = _foreign(layer)
    if reason is None:
        try:
            if position is None:
                return NativeCost(target, *measured_new_file(members, below))
            return NativeCost(target, *measured_append(Place(members, below, position)))
        except ImageError as error:
            reason = error.why
    return NativeCost(target, Moved(), 0, reason)


def _foreign(layer: Layer) -> str | None:
    if isinstance(layer, Qcow2Layer):
        return None
    return f"{layer.path.name} is {layer.format}: the native engine writes qcow2"


def no_native(
    layers: Sequence[Layer], group: Group, target: int | None, options: MergeOptions
) -> str | None:
    """Why the native engine cannot merge the group into `target` (None: a new file)."""
    for index in group.line[group.count :]:
        header = layers[index].header
        if header is not None and header.crypt_method:
            return f"{layers[index].path.name} is encrypted, and the native engine does not read it"
    if target is None:
        return _foreign(layers[group.kept])
    layer = layers[target]
    if layer.header is None:
        return _foreign(layer)
    if layer.file.is_block_device:
        return f"{layer.path.name} is a block device, which the native engine does not append to"
    if layer.header.nb_snapshots:
        return f"{layer.path.name} holds internal snapshots, which the native engine does not carry"
    return _bitmaps(layers, group, target, options) or _no_room(layers, group, layer)


def _bitmaps(
    layers: Sequence[Layer], group: Group, target: int, options: MergeOptions
) -> str | None:
    kept, layer = layers[group.kept], layers[target]
    if target != group.kept:
        for each in (kept, layer):
            if has_bitmaps(each):
                return f"{each.path.name} has bitmaps: merging them is qemu-img's"
        return None
    fate = fate_of(layers, group, target, options)
    if fate.carried or fate.removed:
        return f"{layer.path.name} has bitmaps that are to change: that is qemu-img's"
    if has_bitmaps(layer):
        assert layer.header is not None
        if any(bitmap.in_use for bitmap in read_bitmaps(layer.file, layer.header)):
            return f"{layer.path.name} has a bitmap that is in use"
    return None


def _no_room(layers: Sequence[Layer], group: Group, layer: Layer) -> str | None:
    """Why the new header does not fit, whichever way the backing file is named."""
    header = layer.header
    assert header is not None
    names: list[str | None] = [None]
    fmt = None
    if group.below is not None:
        below, lowest = layers[group.below], layers[group.members[-1]]
        directory = absolute_name(layer.path).parent
        names = [backing_name(lowest, below, directory), str(absolute_name(below.path))]
        fmt = below.format
    area = layer.file.pread(0, header.cluster_size)
    for name in names:
        try:
            switched_header(area, header, Tables(header.size, 0, 0, 0, 1), name, fmt)
        except ValueError as error:
            return f"{layer.path.name}: {error}"
    return None
