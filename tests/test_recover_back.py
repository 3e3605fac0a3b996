"""Going back: kept points are as they were; where dropped ones are not, it is said."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from cli_runner import command, run
from merging import Disk, build
from stopping import LINES, commit_began, renaming, stopped

from fixtures.oracle import raw_of
from qchain.errors import FailedMidway, Refused
from qchain.plan.options import MergeOptions
from qchain.plan.steps import Command, Step
from qchain.run.journal import Journal
from qchain.run.recover import journals_at, recover

BOTH = ("base.qcow2", "l1.qcow2")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return build(tmp_path / "d", LINES)


def different(disk: Disk) -> list[Path]:
    """The points that no longer read as before, says qemu-img."""
    return [path for path in disk.paths if raw_of(path) != disk.points[path.name]]


@pytest.mark.parametrize("strategy", ["commit", "both"])
def test_a_commit_has_written(tmp_path: Path, strategy: str) -> None:
    """Refused, for nothing brings the dropped points back; with the user's word they go."""
    disk = build(tmp_path / "d", [*LINES[:2], "64k:E 192k:-", LINES[2]])
    drop = (*BOTH, "l2.qcow2")
    stopped(disk, drop, MergeOptions(strategy=strategy), commit_began())
    lost = different(disk)
    assert lost and disk.active not in lost
    before = {path: path.read_bytes() for path in disk.directory.iterdir() if path.is_file()}
    told = run("recover", "--back", disk.directory).fails(3)
    assert all(path.name in told for path in lost) and "--give-up-dropped" in told
    assert {p: p.read_bytes() for p in disk.directory.iterdir() if p.is_file()} == before
    result = run("recover", "--json", "--back", "--give-up-dropped", disk.directory)
    assert result.code == 0
    (found,) = result.json["recovered"]
    assert found["outcome"] == "put back" and found["active"] == str(disk.active)
    assert {str(path) for path in lost} <= set(found["altered"])
    assert different(disk) == lost
    assert {p.name for p in disk.directory.iterdir()} == {p.name for p in disk.paths}
    assert run("recover", disk.directory).code == 0


def test_it_is_said_to_a_person_too(disk: Disk) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), renaming)
    result = run("recover", "--back", "--give-up-dropped", disk.directory)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].endswith("put back")
    assert {line.split(":")[0] for line in lines[1:]} == {str(path) for path in different(disk)}
    assert all("no longer reads as before" in line for line in lines[1:])


def test_nothing_is_given_up_where_all_is_as_before(disk: Disk) -> None:
    """Killed right before the commit: no word of the user is needed."""

    def before_the_commit(_number: int, step: Step) -> bool:
        return isinstance(step, Command) and step.commits

    stopped(disk, BOTH, MergeOptions(strategy="commit"), before_the_commit)
    result = run("recover", "--json", "--back", disk.directory)
    assert result.json["recovered"][0]["altered"] == []
    disk.expect({path.name: path.name for path in disk.paths})


def test_a_pull_alters_nothing(disk: Disk) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="pull"), lambda number, _step: number == 9)
    (done,) = recover(journals_at(disk.directory), back=True)
    assert done.outcome == "put back" and done.altered == () and different(disk) == []


@pytest.mark.parametrize("names", ["kept", "lowest", "target"])
def test_back_until_the_switch(disk: Disk, names: str) -> None:
    """Also when the header of the target is that of the result already."""
    lines = [*LINES[:2], "64k:E 192k:-", LINES[2]]
    drop = (*BOTH, "l2.qcow2")
    number, count, backs = 0, 1, 0
    while number < count:
        made = build(disk.directory.parent / str(number), lines)
        plan = stopped(made, drop, MergeOptions(strategy="both", names=names),
                       lambda n, _step, number=number: n == number)  # fmt: skip
        count = len(plan.steps)
        switched = {path.name for path in made.paths} - {p.name for p in made.directory.iterdir()}
        inodes = {path.name: path.stat().st_ino for path in made.paths if path.exists()}
        same = {index.path.name: index.file.id.inode for index in plan.layers} == inodes
        try:
            recover(journals_at(made.directory), back=True, give_up_dropped=True)
        except Refused as error:
            assert "only go forward" in str(error)
            assert switched or not same
            recover(journals_at(made.directory))
            made.expect(made.after(plan))
        else:
            assert same
            backs += 1
            assert raw_of(made.active) == made.points[made.active.name]
            assert {p.name for p in made.directory.iterdir()} == {p.name for p in made.paths}
        number += 1
    assert backs > count / 2


@pytest.mark.parametrize("moment", ["removing", "removed"])
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize("kind", ["commit", "pull", "renaming"])
def test_going_back_is_killed(disk: Disk, moment: str, back: bool, kind: str) -> None:
    """The work files are gone in part, or all; the journal is still there."""
    lines = [*LINES[:2], "64k:E 192k:-", LINES[2]]
    made = build(disk.directory.parent / "made", lines)
    pulling = commit_began()

    def when(number: int, step: Step) -> bool:
        if kind == "commit":
            return pulling(number, step)
        if kind == "pull":
            return isinstance(step, Command) and "--image-opts" in step.argv
        return renaming(number, step)

    plan = stopped(made, (*BOTH, "l2.qcow2"), MergeOptions(strategy="both"), when)
    lost = different(made)
    child = os.fork()
    if child == 0:
        holder, name = (Path, "rmdir") if moment == "removing" else (Journal, "remove")
        setattr(holder, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        recover(journals_at(made.directory), back=True, give_up_dropped=True)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert raw_of(made.active) == made.points[made.active.name]
    journals = journals_at(made.directory)
    assert len(journals) == 1
    if back:
        if lost:
            with pytest.raises(Refused, match="the commit had begun"):
                recover(journals, back=True)
        (done,) = recover(journals, back=True, give_up_dropped=True)
        assert set(lost) <= set(done.altered)
        assert {p.name for p in made.directory.iterdir()} == {p.name for p in made.paths}
        assert raw_of(made.active) == made.points[made.active.name]
    else:
        recover(journals)
        made.expect(made.after(plan))


def test_the_flag_alone_makes_no_sense(disk: Disk) -> None:
    assert "--back" in run("recover", "--give-up-dropped", disk.directory).fails(2)


# --- a merge that ends itself -----------------------------------------------------------


def test_a_merge_that_fails_says_it(disk: Disk) -> None:
    seen: list[Step] = []

    def fail(step: Step) -> None:
        if seen and isinstance(seen[-1], Command) and seen[-1].commits:
            raise OSError(28, "No space left on device", str(disk.paths[0]))
        seen.append(step)

    with pytest.raises(FailedMidway) as caught:
        disk.merge(BOTH, MergeOptions(strategy="commit"), before_step=fail)
    lost = different(disk)
    assert lost and all(path.name in str(caught.value) for path in lost)
    assert "every kept point is intact" in str(caught.value)
    assert not journals_at(disk.directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_merge_says_it(disk: Disk, tmp_path: Path, number: int) -> None:
    program = tmp_path / "qemu-img"
    program.write_text(
        f'#!/bin/sh\nqemu-img "$@" || exit\n[ "$1" = commit ] || exit 0\nkill -{number} $PPID\n'
        "exec sleep 9\n"
    )
    program.chmod(0o755)
    merge = ("merge", "--yes", "--strategy", "commit", "--drop", BOTH[0], "--drop", BOTH[1])
    result = command(*merge, disk.active, QCHAIN_QEMU_IMG=str(program))
    line = result.fails(130)
    lost = different(disk)
    assert lost and disk.active not in lost
    assert line.startswith("qchain: interrupted: every kept point is intact")
    assert all(path.name in line for path in lost)
    assert {p.name for p in disk.directory.iterdir()} == {p.name for p in disk.paths}


def test_an_interruption_that_alters_nothing_says_so(disk: Disk) -> None:
    def interrupt(_step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        disk.merge(BOTH, MergeOptions(strategy="commit"), before_step=interrupt)
    assert caught.value.args == ("every point reads as before; merge again",)
    assert different(disk) == []
