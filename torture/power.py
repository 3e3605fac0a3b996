"""The power fails at any moment of a merge; after the next mount the same must be true."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from random import Random

from torture.disks import KINDS, LoopDisk
from torture.kills import Tally, Trials, go_on, prepared
from torture.place import Loss, Place, Planned
from torture.process import Child, Counts, Spot

__all__ = ["Power"]


class Power(Trials):
    """One case whose file system is cut off `tries` times, on XFS and ext4 in turn.

    Half of the times at a random moment, else where a process was killed: in the same moment all
    that was not flushed is gone.
    """

    disk: LoopDisk

    def run(self) -> Tally:
        with ExitStack() as stack:
            kind = KINDS[self.seed % len(KINDS)]
            self.disk = stack.enter_context(LoopDisk(kind, self.scratch))
            return super().run()

    def prepare(self) -> tuple[Place, Planned]:
        return prepared(self.seed, self.scratch, self.disk.mount / "images", self.work)

    def once(
        self,
        place: Place,
        planned: Planned,
        counts: Counts,
        spot: Spot,
        dice: Random,
        again: bool,
        back: bool,
    ) -> None:
        place.restore()
        self.disk.flush()
        if dice.random() < 0.5:
            spot = Spot("time", seconds=dice.uniform(0, 1.0) * counts.seconds)
        elif spot.kind == "orphan":
            spot = Spot("step", dice.randrange(counts.steps), nth=dice.randrange(2))
        self.doing = f"{self.doing.split(',')[0]}, power lost on {self.disk.kind} {spot}"
        child = Child(place.case.argv(place.directory), self.work, spot)
        ended = child.end(before_kill=self.disk.cut)
        if spot.kind != "time":
            self.disk.cut()
        self.disk.again()
        self.tally.notes["hit" if ended.hit else "missed"] += 1
        self.tally.notes[self.disk.kind] += 1
        self.tally.notes[f"at {spot.kind}"] += 1
        # It may have seen the errors before it was killed: then it says so.
        if ended.code not in (-signal.SIGKILL, 0, 2, 3, 4, 5) or "internal error" in ended.err:
            raise Loss(f"power lost {spot}: it ended with {ended.code}: {ended.err}")
        place.intact(planned, f"power lost {spot}")
        go_on(place, planned, self.work, dice, self.tally, back=back)
