"""Another writer fills the file system at any moment of a merge."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from torture.kills import Try, go_on
from torture.ondisk import OnDisk
from torture.place import Loss
from torture.process import Child

__all__ = ["Full"]


class Full(OnDisk):
    """One case on a small file system that fills up `tries` times, XFS and ext4 in turn."""

    def once(self, this: Try) -> None:
        """Fill it at a moment, and in half of the tries give the room back at a later one."""
        place, planned, dice = this.place, this.planned, this.dice
        place.restore()
        when = dice.uniform(0, 0.8) * this.counts.seconds
        # What is left over may be enough for a while.
        spare = dice.choice((0, 0, 4096, 65536, 262144))
        gives_back = dice.uniform(0, 0.5) * this.counts.seconds if this.again else None
        self.doing = f"{self.doing.split(',')[0]}, full but for {spare} bytes after {when:.3f} s"
        child = Child(place.case.argv(place.directory), self.work)
        self.doze(child, when)
        self.fill(spare)
        if gives_back is not None:
            self.doze(child, gives_back)
            self.empty()
        ended = child.end()
        self.empty()
        if ended.code not in (0, 3, 5) or "internal error" in ended.err:
            raise Loss(f"the disk was full, and it ended with {ended.code}: {ended.err}")
        if ended.code:
            self.tally.notes[f"exit {ended.code}"] += 1
        self.tally.notes["hit" if ended.code else "missed"] += 1
        self.tally.notes[self.disk.kind] += 1
        place.intact(planned, f"the disk was full after {when:.3f} s")
        if ended.code == 3 and not place.untouched():
            raise Loss(f"refused, and there are {sorted(place.names())}")
        go_on(place, planned, self.work, dice, self.tally, back=this.back)

    def doze(self, child: Child, seconds: float) -> None:
        """Wait, but not longer than the child is there."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and child.alive():
            time.sleep(0.002)

    def fill(self, spare: int) -> None:
        """Take all the room that there is but for `spare` bytes."""
        path = self.disk.mount / "other"
        with path.open("ab") as file:
            for unit in (1 << 20, 65536, 4096):
                with suppress(OSError):
                    while self.disk.free() > spare:
                        size = file.seek(0, os.SEEK_END)
                        os.posix_fallocate(file.fileno(), size, unit)
            os.fsync(file.fileno())

    def empty(self) -> None:
        """Give the room back."""
        (self.disk.mount / "other").unlink(missing_ok=True)
        self.disk.flush()
