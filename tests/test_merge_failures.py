"""A qemu-img that fails, lies, does half, or finds the disk full.

It stands in for the real one at one command of a merge. Whatever it does, the merge ends
in `FailedMidway` (never as if it were done), no file is gone, and every kept point reads as
before, says the real qemu-img. Then the real one finishes: by merging again, or by
`recover` where something was left to do; and nothing of all that remains in the directory.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from merging import Disk, build, format_of

from fixtures.build import build_layer
from fixtures.language import parse_layer
from fixtures.oracle import qemu_check, raw_of
from qchain.chain.chain import open_chain
from qchain.chain.gate import Gate
from qchain.errors import ExitCode, FailedMidway
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Command, Step
from qchain.run.execute import execute
from qchain.run.qemu_img import QemuImg
from qchain.run.recover import journals_at, recover

K = 1024
# Cluster by cluster (64k), who has data there:  a: 0 2 6 7 (4: zero)   b: 0 1 3   top: 0 4
LINES = [
    "512k:A 512k:-",
    "64k:B 64k:- 64k:B 64k:- 64k:0 64k:- 128k:B",
    "128k:C 64k:- 64k:C",
    "64k:D 192k:- 64k:D",
]
NAMES = ("base", "a", "b", "top")

FAKE = """#!{python} -IS
import os, resource, signal, subprocess, sys, tempfile
argv = sys.argv[1:]
kind = {{"rebase": "point" if "-u" in argv else "pull"}}.get(argv[0], argv[0])
real = "qemu-img"
mark, mode, target, kept, fmt = {mark!r}, {mode!r}, {target!r}, {kept!r}, {fmt!r}
if kind != {kind!r} or (os.path.exists(mark) and not {always}):
    os.execvp(real, [real, *argv])
open(mark, "w").close()

def run(*words):
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

# qchain holds the locks of the image that qemu-img is told of.
unlocked = "driver=" + fmt + ",file.locking=off,file.filename=" + target.replace(",", ",,")

def write(offset, *what):
    words = " ".join(map(str, ["write -q", *what, offset, 65536]))
    run("qemu-io", "-c", words, "--image-opts", unlocked)

if mode == "refuse":
    sys.exit("qemu-img: no")
elif mode == "die":
    os.kill(os.getpid(), signal.SIGKILL)
elif mode == "nothing":
    sys.exit(0)
elif mode == "done, then fail":
    run(real, *argv)
    sys.exit("qemu-img: something at the end")
elif mode == "half":
    # The first cluster is right, the others are forgotten, the header is switched.
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        run(real, "convert", "-U", "-O", "raw", kept, "raw")
        with open("raw", "rb") as raw, open("cluster", "wb") as cluster:
            raw.seek({cluster})
            cluster.write(raw.read(65536))
        write({cluster}, "-s cluster")
    if kind == "pull":
        run(real, "rebase", "-u", "-b", argv[argv.index("-b") + 1], "-F", "qcow2", "--image-opts",
            unlocked)
elif mode == "garbage":
    run(real, *argv)
    write({cluster}, "-P 0x5a")
elif mode == "cut":
    size = os.path.getsize(target)
    run(real, *argv)
    os.truncate(target, size)
elif mode == "wrong name":
    argv[argv.index("-b") + 1] = kept
    run(real, *argv)
elif mode == "full":
    # As a full disk: no file grows by more than one cluster.
    room = os.path.getsize(target) + 65536
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    os.execvp(real, [real, *argv])
"""


@dataclass(frozen=True)
class Merge:
    """`cluster`: (of the commit, of the pull) a guest offset that the command has to move."""

    strategy: str
    names: str
    drop: tuple[str, ...]
    target: str
    kept: str = "top"
    cluster: tuple[int, int] = (0, 0)
    lines: tuple[str, ...] = tuple(LINES)

    def __str__(self) -> str:
        return f"{self.strategy}-{self.names}-{''.join(self.drop)}"


PULL = Merge("pull", "kept", ("a", "b"), "top", cluster=(0, 64 * K))
FLAT = Merge("pull", "lowest", ("base", "a", "b"), "top", cluster=(0, 64 * K))
COMMIT = Merge("commit", "kept", ("a", "b"), "a")
BOTH = Merge("both", "kept", ("a", "b"), "b", cluster=(0, 128 * K))
BOTH_LOWEST = Merge("both", "lowest", ("a", "b"), "b", cluster=(0, 128 * K))
# Here top stays as it is, and its header is written to.
ABOVE_COMMIT = Merge("commit", "target", ("a",), "a", kept="b", cluster=(0, 0))
ABOVE_PULL = Merge("pull", "lowest", ("a",), "b", kept="b", cluster=(0, 128 * K))
SHORTER = Merge(
    "commit", "kept", ("a",), "a", kept="b",
    lines=("1M:A", "64k:B 64k:- 64k:B 64k:- 64k:0", "[size=256k] 128k:C", "[size=1M] 64k:D"),
)  # fmt: skip

CASES = [
    *((merge, "commit", mode)
      for merge in (COMMIT, BOTH, ABOVE_COMMIT)
      for mode in ("refuse", "die", "nothing", "done, then fail", "half", "garbage")),
    *((COMMIT, "commit", mode) for mode in ("cut", "full")),
    *((merge, "pull", mode)
      for merge in (PULL, FLAT, BOTH, BOTH_LOWEST, ABOVE_PULL)
      for mode in ("refuse", "die", "nothing", "done, then fail", "half", "full")),
    *((merge, "point", mode)
      for merge in (PULL, FLAT, BOTH_LOWEST, ABOVE_COMMIT, ABOVE_PULL)
      for mode in ("refuse", "nothing", "done, then fail", "wrong name")),
    *((merge, "create", mode)
      for merge in (PULL, FLAT) for mode in ("refuse", "nothing", "done, then fail")),
    *((SHORTER, "resize", mode) for mode in ("refuse", "nothing", "done, then fail")),
]  # fmt: skip


def fake(
    directory: Path, disk: Disk, merge: Merge, kind: str, mode: str, always: bool = False
) -> QemuImg:
    path = {p.stem: p for p in disk.paths}
    program = directory / "qemu-img"
    words = {
        "python": sys.executable,
        "mark": str(directory / "mark"),
        "mode": mode,
        "kind": kind,
        "always": always,
        "target": str(path[merge.target]),
        "kept": str(path[merge.kept]),
        "fmt": format_of(path[merge.target]),
        "cluster": merge.cluster[kind == "pull"],
    }
    program.write_text(FAKE.format(**words))
    program.chmod(0o755)
    return QemuImg(program)


def options_of(merge: Merge) -> MergeOptions:
    return MergeOptions(strategy=merge.strategy, names=merge.names)


def dropped(merge: Merge) -> list[str]:
    return [f"{name}.qcow2" for name in merge.drop]


def failing(disk: Disk, merge: Merge, qemu: QemuImg | None, **more: object) -> Plan:
    """A merge that must not succeed; the plan it followed."""
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=tuple(dropped(merge))), options_of(merge))
        assert not plan.refusals, plan.refusals
        with pytest.raises(FailedMidway) as caught:
            execute(plan, chain, qemu, **more)  # type: ignore[arg-type]
        assert caught.value.exit_code == ExitCode.FAILED
        assert "intact" in str(caught.value)
        return plan


def intact(disk: Disk, merge: Merge) -> None:
    """All files are there, and every kept point reads as before, under its own name."""
    present = {path.name for path in disk.directory.iterdir()}
    assert present >= {path.name for path in disk.paths}
    for path in disk.paths:
        if path.stem not in merge.drop:
            assert raw_of(path) == disk.points[path.name], path.name


def finish(disk: Disk, merge: Merge, plan: Plan) -> None:
    """With the real qemu-img all comes to its end, and nothing is left over."""
    journals = journals_at(disk.directory)
    if journals:
        assert [each.outcome for each in recover(journals)] == ["finished"]
    else:
        leftover = [p.name for p in disk.directory.iterdir() if p.name.startswith(".")]
        assert leftover == []
        disk.merge(dropped(merge), options_of(merge))
    disk.expect(disk.after(plan))


@pytest.mark.parametrize(("merge", "kind", "mode"), CASES, ids=str)
def test_one_command_goes_wrong(tmp_path: Path, merge: Merge, kind: str, mode: str) -> None:
    disk = build(tmp_path / "images", merge.lines, NAMES)
    plan = failing(disk, merge, fake(tmp_path, disk, merge, kind, mode))
    assert (tmp_path / "mark").exists(), "the fake never came into play"
    intact(disk, merge)
    finish(disk, merge, plan)


@pytest.mark.parametrize(
    ("merge", "kind", "mode"),
    [
        (merge, kind, mode)
        for merge in (PULL, FLAT, BOTH_LOWEST, ABOVE_COMMIT, ABOVE_PULL)
        for kind in ("point",)
        for mode in ("refuse", "nothing")
    ],
    ids=str,
)
def test_the_way_back_goes_wrong_as_well(
    tmp_path: Path, merge: Merge, kind: str, mode: str
) -> None:
    """Every `rebase -u` fails, that of the undoing included: the aliases must stay."""
    disk = build(tmp_path / "images", merge.lines, NAMES)
    plan = failing(disk, merge, fake(tmp_path, disk, merge, kind, mode, always=True))
    intact(disk, merge)
    assert journals_at(disk.directory)
    finish(disk, merge, plan)


@pytest.mark.parametrize("merge", [PULL, FLAT, BOTH], ids=str)
def test_a_pull_that_writes_garbage_deletes_nothing(tmp_path: Path, merge: Merge) -> None:
    """Against a writer that destroys what it writes to, what is left is not to make it worse:
    it is noticed, and no file from which the point could be restored is gone."""
    disk = build(tmp_path / "images", merge.lines, NAMES)
    others = [p for p in disk.paths if p.stem not in (merge.target, merge.kept)]
    before = {path: path.read_bytes() for path in others}
    failing(disk, merge, fake(tmp_path, disk, merge, "pull", "garbage"))
    assert {path: path.read_bytes() for path in others} == before
    if merge.target == merge.kept:
        # What the garbage went over came from the dropped images: they still have it.
        by_stem = {path.stem: path for path in disk.paths}
        assert raw_of(by_stem["b"]) == disk.points["b.qcow2"]


def test_no_verification_means_none(tmp_path: Path) -> None:
    """`--verify none` is believed: what a lying qemu-img did not do is lost with the files.

    The other tests would pass on a qchain that never compares; this one shows that it is
    the comparison that saves them.
    """
    disk = build(tmp_path / "images", LINES, NAMES)
    qemu = fake(tmp_path, disk, COMMIT, "commit", "nothing")
    options = MergeOptions(strategy="commit", verify="none")
    _, result = disk.merge(dropped(COMMIT), options, qemu=qemu)
    assert not result.identical
    assert raw_of(disk.active) != disk.points["top.qcow2"]


# --- a disk that is really full --------------------------------------------------------


@contextmanager
def small_filesystem(at: Path) -> Iterator[Path]:
    """16 MiB of ext4 in a file."""
    image, mount = at / "fs", at / "mount"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    make = ["mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=1", image]
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    subprocess.run(make, check=True, capture_output=True, env=environment)
    mount.mkdir()
    subprocess.run(["mount", "-o", "loop", image, mount], check=True, capture_output=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def can_mount() -> bool:
    if os.getuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with small_filesystem(Path(scratch)):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def fill(path: Path) -> None:
    """Take all the room there is."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            os.fsync(file.fileno())


FULL_AT = [(merge, n) for merge in (PULL, FLAT, COMMIT, BOTH, ABOVE_PULL) for n in (0, 1, 2, 3)]


@pytest.mark.skipif(not can_mount(), reason="needs root and loop devices")
@pytest.mark.parametrize(("merge", "moment"), FULL_AT, ids=str)
def test_the_disk_becomes_full(tmp_path: Path, merge: Merge, moment: int) -> None:
    """Full from before the nth command of qemu-img on (or the merge was over by then)."""
    with small_filesystem(tmp_path) as mount:
        disk = build(mount / "images", merge.lines, NAMES)
        commands = 0

        def before_step(step: Step) -> None:
            nonlocal commands
            if isinstance(step, Command):
                if commands == moment:
                    fill(mount / "filler")
                commands += 1

        with open_chain(disk.active) as chain:
            plan = make_plan(chain, Request(drop=tuple(dropped(merge))), options_of(merge))
            assert not plan.refusals
            failed = False
            try:
                execute(plan, chain, before_step=before_step)
            except FailedMidway as error:
                failed = True
                assert "intact" in str(error)
                # How much is wanted, too.
                assert re.search(r"up to \d+ bytes (more )?are (still )?needed", str(error))
        if failed:
            intact(disk, merge)
            (mount / "filler").unlink()
            finish(disk, merge, plan)
        else:
            (mount / "filler").unlink(missing_ok=True)
            disk.expect(disk.after(plan))


SLOW = '#!/bin/sh\ncase $1 in commit) sleep 3 ;; esac\nexec qemu-img "$@"\n'


@pytest.mark.skipif(not can_mount(), reason="needs root and loop devices")
def test_room_is_watched_while_qemu_img_works(tmp_path: Path) -> None:
    """Another writer takes it: the merge stops before the last byte is gone."""
    program = tmp_path / "qemu-img"
    program.write_text(SLOW)
    program.chmod(0o755)
    with small_filesystem(tmp_path) as mount:
        disk = build(mount / "images", ["4M:A", "64k:B", "64k:- 2M:C"], ("base", "a", "top"))
        filler = mount / "filler"
        begun = 0.0

        def before_step(step: Step) -> None:
            nonlocal begun
            if isinstance(step, Command) and step.commits:
                begun = time.monotonic()
                threading.Timer(0.7, take).start()

        def take() -> None:
            room = os.statvfs(mount)
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - (3 << 19))

        options = MergeOptions(strategy="commit")
        with pytest.raises(FailedMidway, match=r"up to \d+ bytes are still needed") as caught:
            disk.merge(["a.qcow2"], options, before_step=before_step, qemu=QemuImg(program))
        assert time.monotonic() - begun < 2.5, "only qemu-img's end was seen"
        assert os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize > 1 << 20
        assert str(caught.value.what) == str(disk.directory)
        disk.expect({"top.qcow2": "top.qcow2", "base.qcow2": "base.qcow2"}, complete=False)
        filler.unlink()
        disk.merge(["a.qcow2"], options)
        disk.expect({"top.qcow2": "top.qcow2", "base.qcow2": "base.qcow2"})


@pytest.mark.parametrize("name", ["EIO", "EDQUOT", "EROFS", "ENOSPC"])
@pytest.mark.parametrize("merge", [PULL, COMMIT, BOTH], ids=str)
def test_the_disk_says_no(tmp_path: Path, merge: Merge, name: str) -> None:
    """A quota, a broken disk, a read-only remount: as seen by qemu-img, from its nth write on."""
    disk = build(tmp_path / "images", merge.lines, NAMES)
    program = tmp_path / "qemu-img"
    for when in (1, 2):
        program.write_text(
            "#!/bin/sh\nexec strace -qq -f -o /dev/null -e inject=pwrite64,pwritev,"
            f'fallocate,fdatasync:error={name}:when={when}+ qemu-img "$@"\n'
        )
        program.chmod(0o755)
        with pytest.raises(FailedMidway) as caught:
            disk.merge(dropped(merge), options_of(merge), qemu=QemuImg(program))
        assert os.strerror(getattr(errno, name)) in str(caught.value)
        intact(disk, merge)
        recover(journals_at(disk.directory))
    if any(path.name == "a.qcow2" for path in disk.directory.iterdir()):
        disk.merge(dropped(merge), options_of(merge))
    assert sorted(path.name for path in disk.directory.iterdir()) == ["base.qcow2", "top.qcow2"]
    for path in disk.directory.iterdir():
        assert raw_of(path) == disk.points[path.name]
        # What qemu-img had allocated when it failed may stay allocated: no harm but space.
        assert qemu_check(path)["corruptions"] == 0


def test_a_backing_name_that_no_header_holds(tmp_path: Path) -> None:
    """No room in a header of 512-byte clusters: qemu-img says so, nothing has changed."""
    deep = tmp_path / ("d" * 200)
    base, mid, top = deep / "base.qcow2", deep / "mid.qcow2", tmp_path / "top.qcow2"
    build_layer(base, parse_layer("64k:A"), 64 * K)
    build_layer(mid, parse_layer("4k:B"), 64 * K, ("base.qcow2", "qcow2"))
    build_layer(top, parse_layer("[cluster=512] 1k:C"), 64 * K, (f"{'d' * 200}/mid.qcow2", "qcow2"))
    longer = deep / ("x" * 180)
    base.rename(longer)
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", longer.name, "-F", "qcow2", str(mid)],
        check=True,
    )
    before = {path: raw_of(path) for path in (top, mid, longer)}
    with open_chain(top, Gate(allow=(tmp_path,))) as chain:
        plan = make_plan(chain, Request(drop=(str(mid),)), MergeOptions(strategy="pull"))
        if not plan.refusals:
            with pytest.raises(FailedMidway):
                execute(plan, chain)
    assert {path: raw_of(path) for path in (top, mid, longer)} == before
    assert list(tmp_path.rglob(".qchain*")) == []
