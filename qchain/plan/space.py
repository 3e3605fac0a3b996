"""What a merge takes of each filesystem: its peak in the order of the steps, and what it frees.

growth, work files    +   before anything is deleted: every group needs its own in full
deleted files         -   after the switch, for the groups that follow

    group 1   +grown +work                -deleted -work
    group 2                                              +grown +work   -deleted -work
    peak      ------------^ here                      or here ----^

What is freed is the space that a file takes itself (`st_blocks`). Of a file with several hard
links nothing would be freed (such are refused); blocks shared with another file (reflinks)
count in full though they stay, for no call tells them: the sum is an upper bound there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.hostfile import HostFile
from qchain.plan.commands import empty_image_bytes
from qchain.plan.growth import Growth
from qchain.plan.selection import Group

__all__ = [
    "Change",
    "append_changes",
    "changes_of",
    "copy_changes",
    "device_shortage",
    "freed_by",
    "highest",
    "peaks",
    "taken_by",
]


@dataclass(frozen=True, slots=True)
class Change:
    """A filesystem (`st_dev`) gives `amount` bytes; gets them back where it is negative."""

    device: int
    amount: int


def peaks(changes: Iterable[Change]) -> dict[int, int]:
    """The most that each filesystem has to give at any moment, in bytes; 0 where it only gets."""
    now: dict[int, int] = {}
    most: dict[int, int] = {}
    for change in changes:
        now[change.device] = now.get(change.device, 0) + change.amount
        most[change.device] = max(most.get(change.device, 0), now[change.device])
    return most


def highest(changes: Iterable[Change]) -> int:
    """The largest of the peaks."""
    return max(peaks(changes).values(), default=0)


def taken_by(layers: Sequence[Layer], group: Group, target: int, growth: Growth) -> list[Change]:
    """What merging `group` into `target` (a layer index) takes before it deletes anything.

    Raises: `OSError` when the target's directory has gone.
    """
    layer = layers[target]
    work = _frozen_bytes(layer) + growth.rescued + growth.work
    if target != group.members[-1]:
        # Two: beside the target, and in the work directory.
        below = group.line[group.members.index(target) + 1]
        work += 2 * empty_image_bytes(layers[below].size)
    out = [Change(layer.path.parent.stat().st_dev, work)]
    if not layer.file.is_block_device:
        out.append(Change(layer.file.id.device, growth.file + _holes_filled(layer, growth)))
    return out


def changes_of(
    layers: Sequence[Layer], group: Group, target: int, growth: Growth, keep_files: bool
) -> list[Change]:
    """What merging `group` into `target` takes and gives back, in order; the sum is what remains.

    Raises: as `taken_by`.
    """
    out = taken_by(layers, group, target, growth)
    if not keep_files:
        files = _deleted(layers, group, target)
        out += [Change(file.id.device, -file.disk_size) for file in files]
    work = out[0]
    return [*out, Change(work.device, -work.amount)]


def append_changes(
    layers: Sequence[Layer], group: Group, target: int, growth: Growth, keep_files: bool
) -> list[Change]:
    """The same by the native engine, which needs no work files to speak of."""
    out = [Change(layers[target].file.id.device, growth.file)]
    if not keep_files:
        files = _deleted(layers, group, target)
        out += [Change(file.id.device, -file.disk_size) for file in files]
    return out


def copy_changes(
    layers: Sequence[Layer], group: Group, size: int, keep_files: bool
) -> list[Change]:
    """The same of a copy: a new file of `size` bytes, beside the kept image."""
    out = [Change(layers[group.kept].path.parent.stat().st_dev, size)]
    if not keep_files:
        files = _deleted(layers, group, None)
        out += [Change(file.id.device, -file.disk_size) for file in files]
    return out


def freed_by(layers: Sequence[Layer], group: Group, target: int | None) -> int:
    """Bytes that the files take that go away."""
    return sum(file.disk_size for file in _deleted(layers, group, target))


def _deleted(layers: Sequence[Layer], group: Group, target: int | None) -> list[HostFile]:
    files = [layers[index].file for index in group.owned if index != target]
    return [file for file in files if not file.is_block_device]


def _holes_filled(layer: Layer, growth: Growth) -> int:
    """Bytes written into clusters that the file has, but no space for (preallocated ones)."""
    if layer.header is None:
        return 0
    return min(max(0, layer.file.size - layer.file.disk_size), growth.written)


def _frozen_bytes(layer: Layer) -> int:
    """The copy of the map (`qchain.verify.frozen.freeze`): header, L1 table, L2 tables."""
    if not isinstance(layer, Qcow2Layer):
        return 0
    cluster, l1 = layer.cluster_size, layer.tables.l1
    tables = int((l1 != 0).sum())
    return cluster * (1 + -(-max(len(l1) * 8, 1) // cluster) + tables)


def device_shortage(layer: Layer, growth: Growth) -> str | None:
    """Why the result does not fit into the block device of `layer`; None if it does.

    A device does not grow: the last cluster that is used, or the end of the raw disk, must
    lie within it.
    """
    if not layer.file.is_block_device or growth.end <= layer.file.size:
        return None
    return (
        f"{layer.path.name} is a block device of {layer.file.size} bytes, and the result may need "
        f"{growth.end}; enlarge it, or take another way"
    )
