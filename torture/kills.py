"""Killed anywhere, and what must be true then: the scenario that the others build upon."""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from torture.cases import Case, draw
from torture.place import Loss, Place, Planned
from torture.process import Counts, Ended, Spot, count, run

_BUSY = ("in use", "being changed", "another qchain is working")

__all__ = ["Tally", "Trials", "Try", "go_on", "prepared", "until_free"]


@dataclass
class Tally:
    """What has been done. `tries`: how often; `notes`: what of it was of which kind."""

    tries: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.tries += other.tries
        self.notes += other.notes
        self.losses += other.losses


def plan_of(place: Place, work: Path) -> Planned | None:
    """What qchain plans; None when it refuses."""
    case = place.case
    words = [word for word in case.argv(place.directory)[1:] if word != "--yes"]
    ended = run(["plan", *words, "--json"], work)
    if ended.code == 3:
        return None
    if ended.code != 0:
        raise Loss(f"the plan ended with {ended.code}: {ended.err}")
    groups = json.loads(ended.out)["groups"]
    results = {name: name for name in case.kept}
    for group in groups:
        results.pop(os.path.relpath(group["kept"], place.directory))
    for group in groups:
        kept, result = (os.path.relpath(group[key], place.directory) for key in ("kept", "result"))
        results[result] = kept
    return Planned(results, len(groups), len(groups) == 1)


def prepared(
    seed: int, scratch: Path, directory: Path, work: Path, drawing: Callable[[int], Case] = draw
) -> tuple[Place, Planned]:
    """The first case from `seed` on (in steps of a million) that qchain agrees to merge."""
    for number in range(seed, seed + 100_000_000, 1_000_000):
        place = Place(drawing(number), scratch, directory)
        shutil.rmtree(directory, ignore_errors=True)
        place.build()
        place.restore()
        planned = plan_of(place, work)
        if planned is not None and planned.groups:
            return place, planned
    raise AssertionError("qchain refuses everything")


def merged(place: Place, planned: Planned, work: Path) -> Counts:
    """The merge undisturbed, judged; what it did."""
    place.restore()
    ended, counts = count(place.case.argv(place.directory), work)
    if ended.code != 0:
        raise Loss(f"undisturbed it ended with {ended.code}: {ended.err}")
    place.finished(planned, "undisturbed")
    return counts


def go_on(
    place: Place,
    planned: Planned,
    work: Path,
    dice: Random,
    tally: Tally,
    *,
    counts: Counts | None = None,
    back: bool = False,
    patient: bool = False,
) -> None:
    """From whatever is there to the end: recover, now and then killed once more, or put back.

    `counts`: kill the recovery at a spot of these, first. `patient`: it may end with 5 once, for
    a guest that ran meanwhile changes what was to be compared.

    Raises: `Loss`.
    """
    directories = place.directories()
    dice.shuffle(directories)
    if counts is not None:
        spot = counts.spot(dice)
        ended = run(["recover", directories[0], *["--back"] * back], work, spot)
        tally.notes["recovery killed too"] += ended.hit
        place.intact(planned, f"recovery killed, {spot}")
    for directory in directories:
        if patient and until_free(["recover", directory], work).code == 5:
            place.intact(planned, "not recovered at once")
            tally.notes["recovered at the second time"] += 1
        recover(directory, work, tally, back)
    place.intact(planned, "recovered")
    if place.names() != set(planned.results):
        if any(".qchain" in name for name in place.names()):
            raise Loss(f"recovered, and there are {sorted(place.names())}")
        if not (planned.alone or place.untouched()):
            # Of several groups some are merged: the same question cannot be asked again.
            place.consistent("some groups merged")
            return
        ended = run(place.case.argv(place.directory), work)
        if ended.code != 0:
            raise Loss(f"merged again, it ended with {ended.code}: {ended.err}")
    place.finished(planned, "in the end")


def recover(directory: str, work: Path, tally: Tally, back: bool) -> None:
    """Recover there, or put back as far as that goes. Raises `Loss` unless the exit code is 0."""
    forward = ["recover", directory]
    ended = until_free([*forward, *["--back"] * back], work)
    if back and ended.code == 3 and "the commit had begun" in ended.err:
        ended = until_free([*forward, "--back", "--give-up-dropped"], work)
    if back and ended.code == 3 and "only go forward" in ended.err:
        ended = until_free(forward, work)
    if ended.code != 0:
        raise Loss(f"recover ended with {ended.code}: {ended.err}")
    for outcome in ("put back", "finished"):
        tally.notes[f"recover: {outcome}"] += f": {outcome}\n" in ended.out


def until_free(argv: list[str], work: Path, limit: float = 20.0) -> Ended:
    """Again while an image is in use: qemu-img may go on without the qchain that was killed."""
    until = time.monotonic() + limit
    while True:
        ended = run(argv, work)
        busy = ended.code == 3 and any(word in ended.err for word in _BUSY)
        if not busy or time.monotonic() > until:
            return ended
        time.sleep(0.05)


@dataclass(frozen=True, slots=True)
class Try:
    """One of the tries of a case: where to stop, and whether to stop the recovery `again`.

    `counts`: the system calls of an undisturbed merge. `back`: recover by going back.
    """

    place: Place
    planned: Planned
    counts: Counts
    spot: Spot
    dice: Random
    again: bool
    back: bool


class Trials:
    """One case, killed `tries` times, each time somewhere else.

    `scratch`: a directory of one's own, best in memory.
    """

    def __init__(self, seed: int, scratch: Path, tries: int, evidence: Path) -> None:
        """`evidence`: where what shows a loss is kept."""
        self.seed, self.scratch, self.tries, self.evidence = seed, scratch, tries, evidence
        self.work = scratch / "work"
        self.tally = Tally()
        self.place: Place | None = None
        self.doing = "preparing"

    def run(self) -> Tally:
        """All tries, or those up to the first loss; what shows it is kept then."""
        try:
            self.all()
        except Exception as loss:
            traceback.print_exc()
            self.tally.losses.append(f"{type(loss).__name__}: {loss} ({self.keep(loss)})")
        return self.tally

    def all(self) -> None:
        """Raises `Loss`; `doing` and `place` then say where."""
        place, planned = self.prepare()
        self.place = place
        counts = merged(place, planned, self.work)
        dice = Random(self.seed)
        for number in range(self.tries):
            spot = counts.spot(dice)
            again, back = dice.random() < 0.25, dice.random() < 0.3
            self.doing = f"try {number}, killed {spot}"
            self.once(Try(place, planned, counts, spot, dice, again, back))
            self.tally.tries += 1

    def prepare(self) -> tuple[Place, Planned]:
        """The case, and what qchain plans."""
        return prepared(self.seed, self.scratch, self.scratch / "images", self.work)

    def once(self, this: Try) -> None:
        """Merge, be killed, judge, go on."""
        place = this.place
        place.restore()
        ended = run(place.case.argv(place.directory), self.work, this.spot)
        self.note(place, this.spot, ended)
        place.intact(this.planned, f"killed {this.spot}")
        counts = this.counts if this.again else None
        go_on(place, this.planned, self.work, this.dice, self.tally, counts=counts, back=this.back)

    def note(self, place: Place, spot: Spot, ended: Ended) -> None:
        """Exit codes are as promised; what was hit is counted."""
        if not ended.hit and ended.code != 0:
            raise Loss(f"not hit, it ended with {ended.code}: {ended.err}")
        if ended.code >= 0 and ended.code not in (0, 3, 5):
            raise Loss(f"it ended with {ended.code}: {ended.err}")
        notes = self.tally.notes
        notes["hit" if ended.hit else "missed"] += 1
        if ended.hit:
            notes[f"at {spot.kind}"] += 1
            if spot.call and spot.kind != "orphan":
                notes[f"in {spot.call}" if spot.kind != "own" else f"own {spot.call}"] += 1
            notes[f"strategy {place.case.strategy}"] += 1
            notes[f"names {place.case.names}"] += 1

    def keep(self, loss: BaseException) -> Path:
        """Keep what shows the loss."""
        kept = self.evidence / f"{type(self).__name__.lower()}-{self.seed}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        told = [f"seed {self.seed}, {self.doing}", f"{type(loss).__name__}: {loss}"]
        if self.place is not None:
            told.append(str(self.place.case))
            for source, name in ((self.place.directory, "images"), (self.place.template, "before")):
                with suppress(OSError):
                    shutil.copytree(source, kept / name, symlinks=True)
        for name in ("out", "err"):
            with suppress(OSError):
                shutil.copy(self.work / name, kept)
        (kept / "story").write_text("\n".join(told) + "\n")
        return kept
