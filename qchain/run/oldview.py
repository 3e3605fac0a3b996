"""How a kept point reads before the merge, and the proof that the result reads the same.

Where the target is an image of the group, qemu-img writes into the map by which the old
content is found: a copy of it is kept (`qchain.verify.frozen`), and looked through.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from qchain.chain.layer import Layer, Qcow2Layer, RawLayer
from qchain.errors import Damaged, FailedMidway
from qchain.hostfile import HostFile
from qchain.plan.steps import Compare, NativeCopy, NativeWrite
from qchain.plan.traffic import commit_granularity
from qchain.qcow2.header import read_header
from qchain.run.journal import GroupRecord
from qchain.run.pending import read_pending
from qchain.run.private import open_private
from qchain.verify.compare import Comparison, compare
from qchain.verify.frozen import freeze, frozen_view, open_rescued, rescue
from qchain.verify.manifest import check_manifest, take_manifest
from qchain.verify.shared import SharedExtents

__all__ = ["OldView", "rescued_beside"]


def rescued_beside(copy: Path) -> Path:
    """Where the data is kept that a commit overwrites; `copy`: the copy of the map."""
    return copy.with_name("rescued")


class OldView:
    """The kept point of a group as it was, through files held open, and what it is held against."""

    def __init__(self, record: GroupRecord, layers: Sequence[Layer]) -> None:
        """`layers`: the open files of `record.layers`, or none."""
        self.record, self.layers = record, layers
        self.target = layers[record.target] if layers and record.copy is None else None
        self.line: list[Layer] = list(layers[: len(record.line)])
        self.below: list[Layer] = [] if record.below is None else list(layers[record.below :])
        self.comparison: Comparison | None = None
        self._opened: list[HostFile] = []

    def freeze(self, into: Path) -> None:
        """Keep the target's map in the file `into`, and what a commit overwrites beside it."""
        assert isinstance(self.target, Qcow2Layer)
        freeze(self.target, into)
        if self.record.target > 0:
            granularity = commit_granularity(self.target)
            rescue(self.layers, self.record.target, granularity, rescued_beside(into))
        self.look_back(into)

    def look_back(self, copy: Path) -> None:
        """See the kept point through the kept map of the target from now on."""
        assert isinstance(self.target, Qcow2Layer)
        frozen = frozen_view(self.target, copy)
        self._opened.append(frozen.tables.file)
        place = self.record.target
        self.line = list(self.layers[: len(self.record.line)])
        self.line[place] = frozen
        kept_out = open_rescued(self.target, rescued_beside(copy))
        if kept_out is not None:
            self._opened.append(kept_out.file)
            self.line.insert(place, kept_out)

    def take_manifest(self, into: Path, progress: Callable[[int, int], None]) -> None:
        """Write the digests of all that the point reads to the new file `into`."""
        fd = open_private(into)
        try:
            take_manifest(self._now(), fd, progress)
        finally:
            os.close(fd)

    def compare(
        self, step: Compare, everything: bool, progress: Callable[[int, int], None], resumed: bool
    ) -> None:
        """Hold the result against it.

        Args:
            everything: also what resolves to the same place.
            progress: hears bytes done and in all.
            resumed: the merge was stopped; a guest may have run since.

        Raises: `FailedMidway` when they differ.
        """
        new = self._result(step.new, step.pending)
        if new.size != self.line[0].size:
            raise FailedMidway(
                step.new, f"has {new.size} bytes after the merge, not {self.line[0].size}"
            )
        view = [new, *self.below]
        native = any(isinstance(each, (NativeCopy, NativeWrite)) for each in self.record.steps)
        found = compare(
            self._now(),
            view,
            everything=everything,
            # What was shared needs no reading: that it is, the filesystem says anew.
            extents=SharedExtents() if native else None,
            progress=progress,
        )
        if found.identical and step.manifest is not None:
            found = check_manifest(step.manifest, view, progress)
            if not found.identical and not resumed:
                raise Damaged(
                    step.old,
                    f"the result differs from the manifest at guest offset {found.first_difference}"
                    f", {found.different_bytes} bytes in pieces of 64 KiB",
                )
        self.comparison = found
        if not found.identical:
            raise FailedMidway(
                step.old,
                f"the merged result differs at guest offset {found.first_difference} "
                f"({found.different_bytes} bytes differ); nothing was deleted"
                + resumed
                * ", and a guest that ran after the stop may be the reason",
            )

    def _now(self) -> list[Layer]:
        """The old view, with what has been mapped in the kept image since it was opened."""
        old = list(self.line)
        if self.record.target > 0:
            old[0] = self._fresh(old[0])
        return old

    def _open(self, path: Path) -> HostFile:
        file = HostFile(path)
        self._opened.append(file)
        return file

    def _result(self, path: Path, pending: Path | None) -> Layer:
        file = self._open(path)
        if file.id != self.record.goal.id:
            raise FailedMidway(path, "is not the file that was merged into")
        if self.record.goal.format == "raw":
            return RawLayer(path, file)
        if pending is None:
            header = read_header(file)
            header.require_readable(path)
        else:
            # Imported late: qemu-img is the usual engine.
            from qchain.native.inplace import header_of

            header = header_of(path, read_pending(pending).sector)
        return Qcow2Layer(path, file, header)

    def _fresh(self, layer: Layer) -> Layer:
        """The kept image as it is now: where others were let in, more may be mapped by now."""
        file = self._open(layer.path)
        header = read_header(file)
        if file.id != layer.file.id or header.size != layer.size:
            raise FailedMidway(layer.path, "is not what it was when the merge began")
        header.require_readable(layer.path)
        return Qcow2Layer(layer.path, file, header)

    def close(self) -> None:
        """Close what was opened for this view alone."""
        for file in self._opened:
            file.close()
