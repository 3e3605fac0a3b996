"""Merges of random chains and trees, killed anywhere: the part of `make torture` that is in CI.

`QCHAIN_SEED` (default 0) gives others. That it bites: a plain rebase, treated the same, loses data.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fixtures.oracle import qemu_img, qemu_io
from torture.bite import plain_rebase_loses
from torture.cases import NAMES, STRATEGIES, draw
from torture.disks import KINDS, LoopDisk
from torture.kills import Trials, prepared
from torture.place import Loss, Place
from torture.process import Counts, Spot, count, run

SEED = int(os.environ.get("QCHAIN_SEED", "0"))
CASES, TRIES = 10, 10


@pytest.mark.parametrize("number", range(CASES))
def test_killed(scratch: Path, number: int, tmp_path: Path) -> None:
    """100 kills: at step boundaries, within qemu-img, within qchain, at any time."""
    tally = Trials(SEED + number, scratch, TRIES, tmp_path).run()
    assert not tally.losses
    assert tally.tries == TRIES and tally.notes["hit"] >= TRIES // 2


def test_every_spot_is_hit(scratch: Path) -> None:
    """The spots of one merge, one of each kind: whoever is to die there does."""
    place, _planned = prepared(
        SEED, scratch, scratch / "images", scratch / "work", lambda seed: draw(seed, ("both",))
    )
    counts = merged_counts(place, scratch)
    large = max(counts.theirs, key=lambda at: counts.theirs[at]["pwrite64"])
    spots = [
        Spot("step", counts.steps // 2, nth=0),
        Spot("step", counts.steps - 1, nth=1),
        Spot("own", call="fsync", nth=counts.own["fsync"] // 2),
        Spot("both", large, "pwrite64", 1),
        Spot("qemu", large, "pwrite64", 1),
        Spot("orphan", large),
        Spot("time", seconds=0.01),
    ]
    for spot in spots:
        place.restore()
        ended = run(place.case.argv(place.directory), scratch / "work", spot)
        assert ended.hit, spot
        assert ended.code == (5 if spot.kind == "qemu" else -9), (spot, ended)


def merged_counts(place: Place, scratch: Path) -> Counts:
    place.restore()
    ended, counts = count(place.case.argv(place.directory), scratch / "work")
    assert ended.code == 0, ended.err
    assert counts.steps > 8 and counts.own["fsync"] > 4 and counts.seconds > 0
    return counts


def test_all_kinds_are_drawn() -> None:
    cases = [draw(seed) for seed in range(400)]
    assert {case.strategy for case in cases} == set(STRATEGIES)
    assert {case.names for case in cases} == set(NAMES)
    assert {case.images[0].format for case in cases} == {"raw", "qcow2"}
    assert sum(len(case.leaves) > 1 for case in cases) > 50
    assert sum("/" in image.name for case in cases for image in case.images) > 50
    assert draw(5) == draw(5)


# --- that it bites ------------------------------------------------------------------------


def test_a_plain_rebase_that_is_killed_loses_data(scratch: Path) -> None:
    assert plain_rebase_loses(scratch), "rebase has become crash-safe: no two phases are needed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_rebase_without_power_loses_data(scratch: Path, kind: str) -> None:
    with LoopDisk(kind, scratch) as disk:

        def cut() -> None:
            disk.cut()
            disk.again()

        assert plain_rebase_loses(disk.mount, cut)


@pytest.mark.parametrize("damage", ["content", "left over", "missing", "mode", "backing"])
def test_the_judge_notices(scratch: Path, damage: str) -> None:
    """Of a merge that went well: anything that is not as it must be."""
    work = scratch / "work"
    place, planned = prepared(SEED + 2, scratch, scratch / "images", work)
    merged_counts(place, scratch)
    place.finished(planned, "undisturbed")
    name = next(image.name for image in place.case.images if image.name in place.case.leaves)
    path = place.directory / next(file for file, kept in planned.results.items() if kept == name)
    if damage == "content":
        qemu_io(path, ["write -q -P 9 0 512"], "qcow2")
    elif damage == "left over":
        (place.directory / ".qchain-1.journal").touch()
    elif damage == "missing":
        path.unlink()
    elif damage == "mode":
        path.chmod(0o400)
    else:
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", "other", "-F", "qcow2", path)
    with pytest.raises(Loss):
        place.finished(planned, "damaged")
