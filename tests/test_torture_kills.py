"""Merges of random chains and trees, killed anywhere: the part of `make torture` that is in CI.

`QCHAIN_SEED` (default 0) gives others. That it bites: a plain rebase, treated the same, loses data.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fixtures.oracle import qemu_img, qemu_io
from torture.bite import plain_rebase_loses
from torture.cases import NAMES, STRATEGIES, Case, draw
from torture.disks import KINDS, LoopDisk
from torture.kills import Trials, prepared, until_free
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


@pytest.mark.parametrize("call", ["unlink", "rmdir", "fsync"])
def test_going_back_is_killed(scratch: Path, call: str) -> None:
    """At every such call: whoever goes back after that leaves nothing behind either."""
    work = scratch / "work"
    place, planned = prepared(
        SEED + 7, scratch, scratch / "images", work, lambda seed: draw(seed, ("both",), ("kept",))
    )
    counts = merged_counts(place, scratch)
    last = max(at for at, calls in counts.theirs.items() if calls)
    for nth in range(1, 40):
        place.restore()
        assert run(place.case.argv(place.directory), work, Spot("both", last, "pwrite64", 1)).hit
        back = ["recover", place.directories()[0], "--back", "--give-up-dropped"]
        hit = run(back, work, Spot("own", call=call, nth=nth)).hit
        place.intact(planned, f"going back was killed at {call} {nth}")
        for directory in place.directories():
            assert run(["recover", directory, *back[2:]], work).code == 0
        assert place.untouched(), (nth, place.names())
        place.intact(planned, "put back")
        if not hit:
            break
    assert not hit and nth > 1


def a_copy(seed: int) -> Case:
    return draw(seed, ("copy",), ("kept",))


def test_qemu_img_outlives_qchain_while_it_copies(scratch: Path) -> None:
    """Who comes to recover waits: it still writes to the file that would be made again."""
    work = scratch / "work"
    place, planned = prepared(SEED, scratch, scratch / "images", work, a_copy)
    counts = merged_counts(place, scratch)
    convert = next(at for at, calls in sorted(counts.theirs.items()) if calls["ftruncate"])
    place.restore()
    assert run(place.case.argv(place.directory), work, Spot("orphan", convert)).hit
    said = run(["recover", place.directories()[0]], work)
    assert said.code == 3 and "another qchain is working on" in said.err
    for directory in place.directories():
        assert until_free(["recover", directory], work).code == 0
    place.finished(planned, "recovered")


def test_a_new_file_gets_the_number_of_a_deleted_one(scratch: Path) -> None:
    """On ext4 the next one does: the second copy that of what the first has replaced."""
    work = scratch / "work"
    with LoopDisk("ext4", scratch) as disk:
        for seed in range(SEED + 100, SEED + 200):
            place, planned = prepared(seed, scratch, disk.mount / "images", work, a_copy)
            if planned.groups == 2:
                break
        counts = merged_counts(place, scratch)
        for step in range(counts.steps // 2, counts.steps // 2 + 6):
            place.restore()
            assert run(place.case.argv(place.directory), work, Spot("step", step, nth=1)).hit
            for directory in place.directories():
                said = run(["recover", directory], work)
                assert said.code == 0, (step, said.err)
            place.finished(planned, f"killed at step {step}")


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
