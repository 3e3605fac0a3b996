"""What comes late: to the kept image after a copy's switch, to a name or number that was freed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli_runner import run
from merging import Disk, build
from stopping import LINES, deleting, renaming, stopped, the_journal

from fixtures.oracle import qemu_img, raw_of, run_tool
from qchain.chain.chain import open_chain
from qchain.errors import FailedMidway, QchainError, Refused
from qchain.plan.options import MergeOptions
from qchain.plan.steps import Command, Step
from qchain.run.copy import copy_point, planned_copy
from qchain.run.qemu_img import QemuImg
from qchain.run.recover import journals_at, recover


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    (tmp_path / "d").mkdir()
    return build(tmp_path / "d", LINES)


def write(path: Path, where: str) -> None:
    run_tool(["qemu-io", "-f", "qcow2", "-c", f"write -P 77 {where}", path])


def test_a_guest_that_went_on_after_the_copy_had_a_name(disk: Disk) -> None:
    """The copy lacks what it wrote: nothing is deleted, and the way out that is named works."""
    base, _, top = disk.paths
    drop = ("base.qcow2", "l1.qcow2")
    stopped(disk, drop, MergeOptions(strategy="copy", names="lowest"), deleting)
    write(top, "128k 64k")
    expected = raw_of(top)
    with pytest.raises(Refused, match="which lacks that"):
        recover(journals_at(disk.directory))
    assert raw_of(top) == expected
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    top.rename(disk.directory / "aside.qcow2")
    recover(journals_at(disk.directory))
    assert raw_of(disk.directory / "aside.qcow2") == expected
    assert raw_of(base) == disk.points[top.name]


def test_a_stranger_with_the_number_of_a_deleted_file(disk: Disk) -> None:
    """An inode number that was freed says nothing of who has it now."""
    drop = ("base.qcow2", "l1.qcow2")
    seen = 0

    def second(_number: int, step: Step) -> bool:
        nonlocal seen
        seen += deleting(_number, step)
        return seen == 2

    stopped(disk, drop, MergeOptions(strategy="pull"), second)
    (left,) = (p for p in disk.paths[:2] if p.exists())
    gone = {p.name for p in disk.paths} - {p.name for p in disk.directory.iterdir()}
    assert len(gone) == 1
    stranger = disk.directory / "stranger.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", left.name, "-F", "qcow2", stranger)
    # As a file system may well do: the deleted file's number is the new one's.
    journal = the_journal(disk.directory)
    stored = json.loads(journal.read_bytes())
    for layer in stored["layers"]:
        if Path(layer["path"]).name in gone:
            layer["inode"] = stranger.stat().st_ino
    journal.write_text(json.dumps(stored))
    with pytest.raises(Refused, match="backs on"):
        recover([journal])
    assert left.exists()


@pytest.mark.parametrize("when", ["pull", "re-point"])
def test_an_internal_snapshot_in_an_image_that_is_pulled_into(disk: Disk, when: str) -> None:
    """It would read the new backing from then on."""

    def before(_number: int, step: Step) -> bool:
        header = isinstance(step, Command) and step.argv[:2] == ("rebase", "-u")
        pull = isinstance(step, Command) and step.argv[:2] == ("rebase", "-p")
        return header if when == "re-point" else pull

    stopped(disk, ("l1.qcow2",), MergeOptions(strategy="pull"), before)
    qemu_img("snapshot", "-c", "s1", disk.active)
    with pytest.raises(Refused, match="internal snapshot"):
        recover(journals_at(disk.directory))
    assert raw_of(disk.active) == disk.points["l2.qcow2"]


@pytest.mark.parametrize("late", [False, True])
def test_a_disk_that_became_larger_is_not_cut(tmp_path: Path, late: bool) -> None:
    """With nothing verified, too."""
    (tmp_path / "d").mkdir()
    disk = build(tmp_path / "d", ["512k:A", "[size=256k] 64k:B", "64k:C"])
    options = MergeOptions(strategy="commit", verify="none")

    def before(_number: int, step: Step) -> bool:
        commits = isinstance(step, Command) and step.commits
        return renaming(_number, step) if late else commits

    stopped(disk, ("base.qcow2", "l1.qcow2"), options, before)
    qemu_img("resize", "-q", "-f", "qcow2", disk.active, "512k")
    write(disk.active, "400k 64k")
    expected = raw_of(disk.active)
    with pytest.raises(QchainError):
        recover(journals_at(disk.directory))
    assert raw_of(disk.active) == expected


def test_two_copies_to_one_name(disk: Disk, tmp_path: Path) -> None:
    """One of them is made, and it is whole."""
    out = tmp_path / "out.qcow2"

    class Late(QemuImg):
        def run(self, *args: object, **more: object) -> None:
            super().run(*args, **more)  # type: ignore[arg-type]
            if not out.exists():
                with open_chain(disk.active) as again:
                    copy_point(planned_copy(again, out, None))

    with open_chain(disk.active) as chain:
        wanted = planned_copy(chain, out, None)
        with pytest.raises(FailedMidway, match="exists"):
            copy_point(wanted, Late())
    assert raw_of(out) == disk.points["l2.qcow2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "out.qcow2"]


def test_a_plan_that_others_could_have_written(disk: Disk, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    umask = os.umask(0)
    try:
        assert run("plan", disk.active, "--flatten", "-o", plan).code == 0
    finally:
        os.umask(umask)
    assert plan.stat().st_mode & 0o022 == 0
    plan.chmod(0o666)
    assert "others than its owner" in run("apply", plan, "--yes").fails(3)
    disk.expect({path.name: path.name for path in disk.paths})
