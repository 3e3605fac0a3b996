"""Trials on a file system of their own, XFS and ext4 in turn."""

from __future__ import annotations

from contextlib import ExitStack

from torture.disks import KINDS, LoopDisk
from torture.kills import Tally, Trials, prepared
from torture.place import Place, Planned

__all__ = ["OnDisk"]


class OnDisk(Trials):
    """One case on a small file system in a loop device."""

    disk: LoopDisk

    def run(self) -> Tally:
        """All tries, or those up to the first loss."""
        with ExitStack() as stack:
            kind = KINDS[self.seed % len(KINDS)]
            self.disk = stack.enter_context(LoopDisk(kind, self.scratch))
            return super().run()

    def prepare(self) -> tuple[Place, Planned]:
        """The case on the small file system."""
        return prepared(self.seed, self.scratch, self.disk.mount / "images", self.work)
