"""What the native engine's ways of merging a group cost: counted by doing them without writing."""

from __future__ import annotations

from collections.abc import Sequence

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.native.mover import Moved
from qchain.native.newfile import measured_new_file
from qchain.plan.amounts import Traffic
from qchain.plan.model import TimeModel
from qchain.plan.selection import Group

__all__ = ["NativeCost", "copy_cost", "no_native_copy", "seconds_of", "traffic_of"]

NativeCost = tuple[Moved, int]
"""What is done, all data being copied; bytes of the new file, or by which the target grows."""


def copy_cost(layers: Sequence[Layer], group: Group) -> NativeCost | None:
    """The cost of a new file; None where the kept image is not qcow2.

    Raises: `ImageError` when the maps cannot be read.
    """
    line = [layers[index] for index in group.line]
    if not isinstance(line[0], Qcow2Layer):
        return None
    return measured_new_file(line[: group.count], line[group.count :])


def seconds_of(cost: NativeCost, group: Group, model: TimeModel) -> float:
    """The estimate; where extents are shared it takes less."""
    moved, _ = cost
    return round(
        model.seconds(
            read=moved.copied,
            written=moved.copied + moved.written,
            requests=moved.calls,
            serial_requests=0,
            files=len(group.line),
            commands=0,
        ),
        3,
    )


def no_native_copy(layers: Sequence[Layer], group: Group) -> str | None:
    """Why the native engine cannot copy the group; None if it can."""
    kept = layers[group.kept]
    if not isinstance(kept, Qcow2Layer):
        return f"{kept.path.name} is {kept.format}: the native engine writes qcow2"
    return _unreadable(layers, group)


def _unreadable(layers: Sequence[Layer], group: Group) -> str | None:
    """What is encrypted below the group, from where clusters may have to be made whole."""
    for index in group.line[group.count :]:
        header = layers[index].header
        if header is not None and header.crypt_method:
            return f"{layers[index].path.name} is encrypted, and the native engine does not read it"
    return None


def traffic_of(cost: NativeCost, counted: Traffic) -> Traffic:
    """`counted` by the maps, with the runs of this engine."""
    return Traffic(
        copy_bytes=cost[0].copied,
        extents=cost[0].calls,
        held_bytes=counted.held_bytes,
        shown_bytes=counted.shown_bytes,
    )
