"""What bitmaps take of a target, in clusters: those that it loses, those that it gets.

target   | data | old bitmaps |                    commit, both: gone before anything is written
         | data + moved      | bits | table | directory |          placed last, the union of each

A cluster of bits is stored only where a bit in it is set (`store_bitmap_data`), so that the
contents of the sources decide. Each `qemu-img bitmap` stores all bitmaps of its image anew
before it frees what they took (`qcow2_store_persistent_dirty_bitmaps`): for a while there are
two of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.errors import ImageError
from qchain.plan.bitmaps import Carried, Fate, fate_of, has_bitmaps
from qchain.plan.commands import EMPTY_CLUSTER, empty_image_bytes
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Group
from qchain.qcow2.bitmaps import bitmap_clusters, bitmap_table, marked_spans, read_bitmaps
from qchain.qcow2.heads import BITMAP_HEAD

__all__ = ["NO_BITMAPS", "BitmapCount", "BitmapRoom"]

I64 = npt.NDArray[np.int64]

_ALL_ONES = 1  # of a table: no cluster, all bits are set


@dataclass(frozen=True, slots=True)
class BitmapRoom:
    """What the bitmaps of a merge do to the clusters of its target.

    Attributes:
        gone: the host clusters of those that go before anything is written.
        replaced: clusters of those that stay until the others are in place (a pull).
        filled: clusters that these take at most, for they record the pull.
        final: clusters of all that are there in the end.
        final_least: less than `final` where what qemu marks meanwhile decides.
        work: bytes of the work files: what is saved, the overlay that a commit goes through.
    """

    gone: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    replaced: int = 0
    filled: int = 0
    final: int = 0
    final_least: int = 0
    work: int = 0

    @property
    def any(self) -> bool:
        return bool(len(self.gone) or self.replaced or self.final)


NO_BITMAPS = BitmapRoom()


class BitmapCount:
    """Counts for every target of a group; what does not depend on the target is read once."""

    def __init__(self, layers: Sequence[Layer], group: Group, options: MergeOptions) -> None:
        self.layers, self.group, self.options = layers, group, options
        self.has_any = any(has_bitmaps(layers[index]) for index in group.members)
        self._bits: dict[tuple[str, int], int] = {}

    @cached_property
    def fate(self) -> Fate:
        """Of a pull. What is carried is the same for every target; of another one all go."""
        return fate_of(self.layers, self.group, self.group.kept, self.options)

    def room(self, target: int) -> BitmapRoom:
        """Of `target`, a layer index. What cannot be read counts nothing: it is refused anyway."""
        layer = self.layers[target]
        if not self.has_any or not isinstance(layer, Qcow2Layer) or layer.version < 3:
            return NO_BITMAPS
        try:
            return self._room(layer, target)
        except ImageError:
            return NO_BITMAPS

    def _room(self, layer: Qcow2Layer, target: int) -> BitmapRoom:
        header = layer.header
        assert header is not None
        fate = self.fate
        there = bitmap_clusters(layer.file, header)
        carried = [self._clusters(each, layer.cluster_size) for each in fate.carried]
        entries = [_entry(each.name) for each in fate.carried]
        work = self._saved(fate.carried)
        if target != self.group.kept:
            final = sum(carried) + -(-sum(entries) // layer.cluster_size)
            kept = self.layers[self.group.kept]
            work += empty_image_bytes(kept.size) if has_bitmaps(kept) else 0
            return BitmapRoom(there, final=final, final_least=final, work=work)
        final = least = sum(carried)
        filled = 0
        leave = {*fate.removed, *(each.name for each in fate.carried)}
        for bitmap in read_bitmaps(layer.file, header):
            bits = int(np.count_nonzero(bitmap_table(layer.file, header, bitmap) > _ALL_ONES))
            table = -(-bitmap.table_size * 8 // layer.cluster_size)
            grows = "auto" in bitmap.flags and not bitmap.in_use
            most = table + (bitmap.table_size if grows else bits)
            filled += most
            if bitmap.name in leave:
                continue
            least += table + bits
            final += most
            entries.append(_entry(bitmap.name, len(bitmap.extra)))
        directory = -(-sum(entries) // layer.cluster_size)
        return BitmapRoom(
            replaced=len(there),
            filled=filled + directory,
            final=final + directory,
            final_least=least + directory,
            work=work,
        )

    def _saved(self, carried: Sequence[Carried]) -> int:
        """Bytes of the work file that holds these bitmaps."""
        if not carried:
            return 0
        bits = sum(self._clusters(each, EMPTY_CLUSTER) for each in carried)
        directory = -(-sum(_entry(each.name) for each in carried) // EMPTY_CLUSTER)
        # Two of each, see above.
        size = self.layers[self.group.kept].size
        return empty_image_bytes(size) + 2 * EMPTY_CLUSTER * (bits + directory)

    def _clusters(self, carried: Carried, cluster: int) -> int:
        """Clusters of the bits and the table of a bitmap, the union of its sources."""
        size = self.layers[self.group.kept].size
        spans = -(-size // (cluster * 8 * carried.granularity))
        return self._with_bits(carried, cluster, spans) + -(-spans * 8 // cluster)

    def _with_bits(self, carried: Carried, cluster: int, spans: int) -> int:
        """How many of `spans` clusters of bits have any set."""
        key = carried.name, cluster
        if key not in self._bits:
            marked = np.zeros(spans, bool)
            for index in carried.sources:
                layer = self.layers[index]
                assert layer.header is not None
                source = next(
                    each
                    for each in read_bitmaps(layer.file, layer.header)
                    if each.name == carried.name
                )
                span = cluster * 8 * carried.granularity
                marked |= marked_spans(layer.file, layer.header, source, span, spans)
            self._bits[key] = int(np.count_nonzero(marked))
        return self._bits[key]


def _entry(name: str, extra: int = 0) -> int:
    """Bytes of an entry of the directory."""
    return -(-(BITMAP_HEAD + extra + len(name.encode(errors="surrogateescape"))) // 8) * 8
