"""The power fails at any moment of a merge; after the next mount the same must be true."""

from __future__ import annotations

import signal

from torture.kills import Try, go_on
from torture.ondisk import OnDisk
from torture.place import Loss
from torture.process import Child, Spot

__all__ = ["Power"]


class Power(OnDisk):
    """One case whose file system is cut off `tries` times, on XFS and ext4 in turn.

    Half of the times at a random moment, else where a process was killed: in the same moment all
    that was not flushed is gone.
    """

    def once(self, this: Try) -> None:
        """Cut it off, mount it again, judge, go on."""
        place, planned, dice, spot = this.place, this.planned, this.dice, this.spot
        place.restore()
        self.disk.flush()
        if dice.random() < 0.5:
            spot = Spot("time", seconds=dice.uniform(0, 1.0) * this.counts.seconds)
        elif spot.kind == "orphan":
            spot = Spot("step", dice.randrange(this.counts.steps), nth=dice.randrange(2))
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
        go_on(place, planned, self.work, dice, self.tally, back=this.back)
