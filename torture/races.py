"""A guest that tries to open the active image all through a merge, and writes when it may."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from torture.cases import Case, draw
from torture.kills import Trials, Try, go_on, prepared
from torture.place import Loss, Place, Planned
from torture.process import Child, Spot, run

__all__ = ["Races"]

_KEPT_OUT = ("Failed to get", "No such file", "not in qcow2 format", "Could not open")


class Guest:
    """Opens an active image for moments, reads back what it wrote, writes more of it."""

    def __init__(self, images: list[Path], sizes: dict[str, int], log: Path, seed: int) -> None:
        self.images, self.sizes, self.log = images, sizes, log
        self.dice = Random(seed)
        self.pauses = self.dice.choice(((0.0, 0.005, 0.02), (0.05, 0.1, 0.3)))
        self.stop = mmap.mmap(-1, 1)
        self.log.write_text("")

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """In a process of its own, which ends in order: a write is done, or it is not."""
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            code = 1
            try:
                while not self.stop[0]:
                    self.try_once()
                code = 0
            finally:
                os._exit(code)
        try:
            yield
        finally:
            self.stop[0] = 1
            if os.waitpid(pid, 0)[1]:
                raise Loss("the guest failed")

    def try_once(self) -> None:
        """Open, write, flush, stay a moment, close."""
        image = self.dice.choice(self.images)
        size = self.sizes[image.name]
        offset = self.dice.randrange(size // 512) * 512
        length = min(self.dice.choice((512, 4096, 70 * 1024)), size - offset)
        value = self.dice.randrange(1, 255)
        words = [f"write -P {value} {offset} {length}", "flush"]
        if self.dice.random() < 0.5:
            words.append(f"sleep {self.dice.choice((1, 20, 60))}")
        done = subprocess.run(
            ["qemu-io", "-f", "qcow2", *(part for word in words for part in ("-c", word)), image],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stdout + done.stderr
        wrote = f"wrote {length}/{length} bytes" in said
        if not wrote and not any(word in said for word in _KEPT_OUT):
            raise AssertionError(said)
        entry = [image.name, offset, length, value] if wrote else None
        with self.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        time.sleep(self.dice.choice(self.pauses))

    def wrote(self) -> list[tuple[str, int, int, int]]:
        """Name, offset, length, value of every write that the guest was told is done."""
        entries = map(json.loads, self.log.read_text().splitlines())
        return [tuple(entry) for entry in entries if entry]

    @property
    def attempts(self) -> int:
        return len(self.log.read_text().splitlines())


def drawn(seed: int) -> Case:
    """A case whose result has the name that the guest knows."""
    return draw(seed, names=("kept",))


class Races(Trials):
    """One case, merged `tries` times while a guest tries to get in.

    In half of the tries qchain is killed, so that it does; then it is recovered, the guest still
    being there, and once more when it has gone.
    """

    def prepare(self) -> tuple[Place, Planned]:
        """A case with the names policy `kept`."""
        return prepared(self.seed, self.scratch, self.scratch / "images", self.work, drawn)

    def once(self, this: Try) -> None:
        """Merge beside the guest, then judge by what it was told that it has written."""
        place, planned, counts, dice = this.place, this.planned, this.counts, this.dice
        spot = this.spot
        place.restore()
        argv = place.case.argv(place.directory)
        kills = dice.random() < 0.5
        if not kills:
            spot = Spot()
        elif spot.kind == "own":
            spot = Spot("step", dice.randrange(counts.steps))
        self.doing = f"{self.doing.split(',')[0]}, raced, killed {spot}"
        leaves = [place.directory / name for name in place.case.leaves]
        sizes = {path.name: len(place.points[name]) for path, name in zip(
            leaves, place.case.leaves, strict=True)}  # fmt: skip
        names = {path.name: name for path, name in zip(leaves, place.case.leaves, strict=True)}
        guest = Guest(leaves, sizes, self.scratch / "guest", dice.randrange(1 << 30))
        original = place.points
        try:
            # One that is there first is what qchain refuses for; else it is to be kept out.
            child = Child(argv, self.work, spot)
            time.sleep(dice.choice((0, dice.uniform(0, 0.5), dice.uniform(0, 1))) * counts.seconds)
            with guest.at_work():
                codes = [child.end().code]
                if codes[0]:
                    time.sleep(dice.uniform(0, 0.2))
                for directory in place.directories():
                    codes.append(run(["recover", directory], self.work).code)
                    time.sleep(dice.uniform(0, 0.1))
            if bad := [code for code in codes if code not in (-signal.SIGKILL, 0, 3, 5)]:
                raise Loss(f"raced, it ended with {bad}")
            place.points = dict(original)
            for name, offset, length, value in guest.wrote():
                point = names[name]
                content = bytearray(place.points[point])
                content[offset : offset + length] = bytes((value,)) * length
                place.points[point] = bytes(content)
            place.intact(planned, "raced")
            notes = self.tally.notes
            notes["guest wrote"] += len(guest.wrote())
            notes["guest kept out"] += guest.attempts - len(guest.wrote())
            first = codes[0]
            notes["killed" if first < 0 else f"exit {first}"] += 1
            go_on(place, planned, self.work, dice, self.tally, patient=True)
        finally:
            place.points = original
