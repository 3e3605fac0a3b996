"""Between a stop and its recovery the world goes on: nothing of that may be lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from merging import Disk, build
from stopping import LINES, commit_began, deleting, renaming, stopped, the_journal

from fixtures.oracle import qemu_check, qemu_img, qemu_io, raw_of
from qchain.errors import FailedMidway, Refused
from qchain.plan.options import MergeOptions
from qchain.plan.steps import Compare, Step
from qchain.run.recover import journals_at, recover

BOTH = ("base.qcow2", "l1.qcow2")
WRITE = "write -q -P 0xee 128k 64k"
"""Where nothing but the base has data, in the image that a guest uses."""


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return build(tmp_path / "d", LINES)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def guest(image: Path) -> Iterator[int]:
    """A process that has the image open for writing."""
    process = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("length\n")
    process.stdin.flush()
    while "KiB" not in process.stdout.readline():
        pass
    try:
        yield process.pid
    finally:
        process.communicate("quit\n")


# --- a guest ran on the kept image ----------------------------------------------------


@pytest.mark.parametrize("names", ["kept", "lowest", "target"])
@pytest.mark.parametrize(
    ("strategy", "drop"),
    [("commit", BOTH), ("both", BOTH), ("pull", BOTH), ("commit", ("l1.qcow2",))],
    ids=["commit", "both", "pull", "commit-l1"],
)
def test_a_guest_wrote_meanwhile(
    tmp_path: Path, strategy: str, drop: tuple[str, ...], names: str
) -> None:
    """Killed before any step; what is written then is in the point afterwards, whatever way."""
    lines = [*LINES[:2], "128k:- 64k:E 64k:-", LINES[2]]
    drop = (*drop, "l2.qcow2") if "base.qcow2" in drop else drop
    number, count, lost = 0, 1, 0
    while number < count:
        disk = build(tmp_path / str(number), lines)
        plan = stopped(disk, drop, MergeOptions(strategy=strategy, names=names),
                       lambda n, _step, number=number: n == number)  # fmt: skip
        count = len(plan.steps)
        kept = plan.layers[plan.groups[0].group.kept].path
        result = plan.groups[0].result
        assert result is not None
        if kept == disk.active and kept.exists():
            qemu_io(kept, [WRITE], "qcow2")
            expected = raw_of(kept)
            assert expected != disk.points[kept.name]
            try:
                recover(journals_at(disk.directory))
                assert raw_of(result) == expected, f"lost, killed before {plan.steps[number]}"
                assert qemu_check(result)["corruptions"] == 0
                assert not list(disk.directory.glob(".qchain*"))
            except FailedMidway:
                # Pulled into, it is the target itself: there is no telling its writers apart.
                assert strategy == "pull"
                assert raw_of(kept) == expected
                lost += 1
                assert lost < count / 2
        number += 2 if strategy == "commit" else 3


def test_what_was_written_is_taken_over_by_a_second_recovery(disk: Disk) -> None:
    """The first one is stopped while it takes it over."""
    stopped(disk, BOTH, MergeOptions(strategy="commit"), renaming)
    qemu_io(disk.active, [WRITE], "qcow2")
    expected = raw_of(disk.active)
    program = disk.directory.parent / "qemu-img"
    program.write_text('#!/bin/sh\nqemu-img "$@"\nkill -9 $PPID\n')
    program.chmod(0o755)
    child = os.fork()
    if child == 0:
        from qchain.run.qemu_img import QemuImg

        recover(journals_at(disk.directory), qemu=QemuImg(program))
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    time.sleep(0.5)  # what qemu-img holds for qchain ends with it
    assert json.loads(the_journal(disk.directory).read_bytes())["carrying"] is True
    assert raw_of(disk.active) == expected
    assert recover(journals_at(disk.directory))[0].outcome == "finished"
    assert raw_of(disk.active) == expected
    assert [path.name for path in disk.directory.iterdir()] == [disk.active.name]


def test_only_looked_at_is_not_committed_again(disk: Disk, tmp_path: Path) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), renaming)
    os.utime(disk.active)
    program = tmp_path / "qemu-img"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    from qchain.run.qemu_img import QemuImg

    recover(journals_at(disk.directory), qemu=QemuImg(program))
    disk.expect({"l2.qcow2": "l2.qcow2"})


def test_back_keeps_what_was_written(disk: Disk) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), renaming)
    qemu_io(disk.active, [WRITE], "qcow2")
    expected = raw_of(disk.active)
    assert recover(journals_at(disk.directory), back=True, give_up_dropped=True)
    assert raw_of(disk.active) == expected


@pytest.mark.parametrize("names", ["kept", "lowest", "target"])
@pytest.mark.parametrize("when", [renaming, deleting], ids=["rename", "delete"])
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_a_guest_is_running(disk: Disk, names: str, when: object, back: bool) -> None:
    if names == "target":
        when = deleting
    plan = stopped(disk, BOTH, MergeOptions(strategy="both", names=names), when)  # type: ignore[arg-type]
    image = disk.active if disk.active.exists() else plan.groups[0].result
    assert image is not None
    before = contents(disk.directory)
    with guest(image) as pid:
        with pytest.raises(Refused, match=rf"in use by qemu-io \(pid {pid}\)"):
            recover(journals_at(disk.directory), back=back)
        assert contents(disk.directory) == before
    recover(journals_at(disk.directory))
    assert raw_of(plan.groups[0].result or image) == disk.points["l2.qcow2"]


def test_an_internal_snapshot_was_taken(disk: Disk) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), renaming)
    qemu_img("snapshot", "-c", "mine", disk.active)
    before = contents(disk.directory)
    with pytest.raises(Refused, match=r"l2\.qcow2: holds an internal snapshot"):
        recover(journals_at(disk.directory))
    assert contents(disk.directory) == before
    qemu_img("snapshot", "-d", "mine", disk.active)
    recover(journals_at(disk.directory))
    assert raw_of(disk.active) == disk.points["l2.qcow2"]


def test_the_kept_image_was_made_larger(disk: Disk) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), renaming)
    qemu_img("resize", "-q", "-f", "qcow2", disk.active, "512k")
    recover(journals_at(disk.directory))
    assert raw_of(disk.active) == disk.points["l2.qcow2"] + bytes(256 << 10)


# --- names that have become other files -----------------------------------------------


@pytest.mark.parametrize("how", ["new", "restored", "written"])
def test_the_name_of_a_dropped_image_is_taken(disk: Disk, tmp_path: Path, how: str) -> None:
    """After the switch somebody uses the name of what the merge still wants to delete."""
    spare = tmp_path / "spare"
    shutil.copy(disk.paths[1], spare)
    stopped(disk, BOTH, MergeOptions(strategy="commit"), deleting)
    name = disk.paths[1]
    if how == "new":
        name.unlink()
        qemu_img("create", "-q", "-f", "qcow2", "-b", disk.active, "-F", "qcow2", name)
    elif how == "restored":
        spare.replace(name)
    else:
        with name.open("r+b") as file:
            # Nothing but its time shows it.
            file.write(b"QFI\xfb")
    before = contents(disk.directory)
    with pytest.raises(Refused, match=r"l1\.qcow2: (is another file|has changed)"):
        recover(journals_at(disk.directory))
    assert contents(disk.directory) == before
    # As the message says.
    name.rename(disk.directory / "mine")
    assert recover(journals_at(disk.directory))[0].outcome == "finished"
    assert sorted(p.name for p in disk.directory.iterdir()) == ["l2.qcow2", "mine"]
    assert (disk.directory / "mine").read_bytes() == before["l1.qcow2"]


def test_a_dropped_image_deleted_by_hand(disk: Disk) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), deleting)
    disk.paths[1].unlink()
    recover(journals_at(disk.directory))
    disk.expect({"l2.qcow2": "l2.qcow2"})


def test_the_target_was_restored_from_a_backup(disk: Disk, tmp_path: Path) -> None:
    spare = tmp_path / "spare"
    shutil.copy(disk.paths[0], spare)
    stopped(disk, BOTH, MergeOptions(strategy="commit"), renaming)
    shutil.move(spare, disk.paths[0])
    before = contents(disk.directory)
    with pytest.raises(Refused, match=r"base\.qcow2: is another file"):
        recover(journals_at(disk.directory))
    assert contents(disk.directory) == before
    # There is a way out, and it leaves the restored file alone.
    recover(journals_at(disk.directory), back=True, give_up_dropped=True)
    disk.expect({path.name: path.name for path in disk.paths if path.name != "l1.qcow2"}
                | {"l1.qcow2": "l1.qcow2"})  # fmt: skip


def test_a_dropped_image_was_written_to_before_the_switch(disk: Disk) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), renaming)
    qemu_io(disk.paths[1], [WRITE], "qcow2")
    before = contents(disk.directory)
    with pytest.raises(Refused, match=r"l1\.qcow2: has changed since"):
        recover(journals_at(disk.directory))
    assert contents(disk.directory) == before


def test_an_image_is_missing(disk: Disk, tmp_path: Path) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="both"), renaming)
    disk.paths[1].rename(tmp_path / "away")
    before = contents(disk.directory)
    with pytest.raises(Refused, match=r"l1\.qcow2: is missing"):
        recover(journals_at(disk.directory))
    assert contents(disk.directory) == before
    (tmp_path / "away").rename(disk.paths[1])
    recover(journals_at(disk.directory))
    disk.expect({"l2.qcow2": "l2.qcow2"})


def test_an_image_has_become_a_link(disk: Disk, tmp_path: Path) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), deleting)
    disk.paths[1].rename(tmp_path / "away")
    disk.paths[1].symlink_to(tmp_path / "away")
    with pytest.raises(Refused, match="symbolic link"):
        recover(journals_at(disk.directory))


def comparing(_number: int, step: Step) -> bool:
    return isinstance(step, Compare)


def test_a_copy_of_the_directory(disk: Disk, tmp_path: Path) -> None:
    """Its journal is about the originals: from there it must not reach them."""
    stopped(disk, BOTH, MergeOptions(strategy="commit"), deleting)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", disk.directory, copy], check=True)
    before = contents(disk.directory), contents(copy)
    with pytest.raises(Refused, match="a copy, or moved"):
        recover(journals_at(copy))
    assert (contents(disk.directory), contents(copy)) == before


@pytest.mark.parametrize("how", ["images", "directory"])
@pytest.mark.parametrize(("strategy", "when"), [("commit", renaming), ("pull", comparing)])
def test_all_was_restored_from_a_backup(
    disk: Disk, tmp_path: Path, how: str, strategy: str, when: Callable[[int, Step], bool]
) -> None:
    """What to do is said, and done so the chain is as it was; until then nothing is changed."""
    backup = tmp_path / "backup"
    subprocess.run(["cp", "-a", disk.directory, backup], check=True)
    stopped(disk, ("l1.qcow2",), MergeOptions(strategy=strategy), when)
    gone = tmp_path / "gone"
    if how == "images":
        gone.mkdir()
        for path in disk.paths:
            path.rename(gone / path.name)
            subprocess.run(["cp", backup / path.name, path], check=True)
    else:
        disk.directory.rename(gone)
        subprocess.run(["cp", "-a", backup, disk.directory], check=True)
        journals = [path for path in gone.glob(".qchain-*") if path.is_file()]
        subprocess.run(["cp", "-a", *journals, disk.directory], check=True)
    before = contents(disk.directory)
    for back in (False, True):
        with pytest.raises(Refused, match="restored") as caught:
            recover(journals_at(disk.directory), back=back, give_up_dropped=back)
        assert f"'qchain chain {disk.active}'" in str(caught.value)
        assert "delete this journal" in str(caught.value)
    assert contents(disk.directory) == before
    (journal,) = disk.directory.glob(".qchain-*.journal")
    journal.unlink()
    disk.expect({path.name: path.name for path in disk.paths}, complete=False)
    assert recover(journals_at(disk.directory)) == []
    plan, _ = disk.merge(("l1.qcow2",))
    disk.expect(disk.after(plan), complete=False)


def test_the_directory_was_moved(disk: Disk, tmp_path: Path) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), deleting)
    away = tmp_path / "away"
    disk.directory.rename(away)
    todo = f"moved since; put the directory itself back as {disk.directory}"
    with pytest.raises(Refused, match=todo):
        recover(journals_at(away))
    away.rename(disk.directory)
    recover(journals_at(disk.directory))
    disk.expect({"l2.qcow2": "l2.qcow2"})


# --- overlays that came later ----------------------------------------------------------


@pytest.mark.parametrize("names", ["lowest", "target"])
@pytest.mark.parametrize("number", [2, None], ids=["commit", "delete"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["beside", "--scan"])
def test_a_snapshot_was_taken_meanwhile(
    disk: Disk, tmp_path: Path, names: str, number: int | None, elsewhere: bool
) -> None:
    def when(n: int, step: Step) -> bool:
        return deleting(n, step) if number is None else n == number

    other = tmp_path / "elsewhere"
    other.mkdir()
    stopped(disk, BOTH, MergeOptions(strategy="commit", names=names, scan=(other,)), when)
    new = (other if elsewhere else disk.directory) / "new.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", disk.active, "-F", "qcow2", new)
    qemu_io(new, [WRITE], "qcow2")
    expected, before = raw_of(new), contents(tmp_path)
    with pytest.raises(Refused, match=r"new\.qcow2: backs on l2\.qcow2"):
        recover(journals_at(disk.directory))
    assert contents(tmp_path) == before
    recover(journals_at(disk.directory), back=True, give_up_dropped=True)
    assert raw_of(new) == expected


def test_a_snapshot_of_a_kept_name_does_not_matter(disk: Disk) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), renaming)
    new = disk.directory / "new.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", disk.active, "-F", "qcow2", new)
    recover(journals_at(disk.directory))
    assert raw_of(new) == disk.points["l2.qcow2"]


# --- a file system mounted anew ----------------------------------------------------------


@pytest.mark.parametrize("when", [renaming, deleting], ids=["rename", "delete"])
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_another_device_number(disk: Disk, when: object, back: bool) -> None:
    """What the journal has is from before: here it is made to be another."""
    stopped(disk, BOTH, MergeOptions(strategy="both"), when)  # type: ignore[arg-type]
    journal = the_journal(disk.directory)
    stored = json.loads(journal.read_bytes())
    for layer in stored["layers"]:
        layer["device"] += 1
    journal.write_text(json.dumps(stored))
    if back and when is renaming:
        recover([journal], back=True, give_up_dropped=True)
        assert raw_of(disk.active) == disk.points["l2.qcow2"]
    else:
        recover([journal])
        disk.expect({"l2.qcow2": "l2.qcow2"})


@pytest.mark.parametrize("field", [None, "inode"])
def test_another_device_number_while_all_were_written_to(tmp_path: Path, field: str | None) -> None:
    """A chain of two, stopped in its commit: found by `make torture`."""
    disk = build(tmp_path / "d", LINES[:2])
    stopped(disk, ["base.qcow2"], MergeOptions(strategy="commit"), commit_began())
    journal = the_journal(disk.directory)
    stored = json.loads(journal.read_bytes())
    assert stored["unsettled"] == [0, 1]
    for layer in stored["layers"]:
        layer["device"] += 1
    if field is not None:
        stored["layers"][1][field] += 1
    journal.write_text(json.dumps(stored))
    if field is None:
        recover([journal])
        disk.expect({"l1.qcow2": "l1.qcow2"})
    else:
        with pytest.raises(Refused, match="is another file"):
            recover([journal])


@pytest.mark.parametrize("field", ["inode", "digest"])
def test_another_device_number_and_another_file(disk: Disk, field: str) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), deleting)
    journal = the_journal(disk.directory)
    stored = json.loads(journal.read_bytes())
    for layer in stored["layers"]:
        layer["device"] += 1
        if field == "digest" or layer["path"] == str(disk.paths[1]):
            layer[field] = 1 if field == "inode" else "0"
    journal.write_text(json.dumps(stored))
    before = contents(disk.directory)
    with pytest.raises(Refused, match=r"l1\.qcow2"):
        recover([journal])
    assert contents(disk.directory) == before


def test_more_images_than_files_may_be_open(tmp_path: Path) -> None:
    disk = build(tmp_path / "d", ["64k:A", *["[cluster=4k] 4k:B"] * 24])
    stopped(
        disk, [path.name for path in disk.paths[:-1]], MergeOptions(strategy="commit"), renaming
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, hard))
    try:
        recover(journals_at(disk.directory))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    disk.expect({disk.active.name: disk.active.name})
