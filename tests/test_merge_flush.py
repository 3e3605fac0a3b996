"""A flush that failed is a failure, even where qemu-img says by its exit code that all is well."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from merging import Disk, build
from test_traps import needs_strace

from fixtures.oracle import qemu_check, raw_of
from qchain.errors import FailedMidway
from qchain.plan.options import MergeOptions
from qchain.plan.steps import Command, Step, Sync
from qchain.run.qemu_img import QemuImg

LINES = ["256k:A 64k:- 64k:B", "64k:- 128k:C", "64k:D 128k:- 64k:D"]
NAMES = ("base", "mid", "top")

FAILING = """#!/bin/sh
[ "$1" = {verb} ] && [ "$2" != -u ] || exec qemu-img "$@"
exec strace -f -o {log} -e trace=fdatasync -e inject=fdatasync:error=EIO:when={nth} qemu-img "$@"
"""


@needs_strace
@pytest.mark.parametrize(("verb", "strategy"), [("rebase", "pull"), ("commit", "commit")])
def test_each_flush_of_qemu_img(tmp_path: Path, verb: str, strategy: str) -> None:
    """rebase exits 0 when the flush of its tables fails; what follows would delete the data."""
    failed = 0
    for nth in (1, 2, 3):
        disk = build(tmp_path / str(nth), LINES, NAMES)
        log = tmp_path / "log"
        program = tmp_path / "qemu-img"
        program.write_text(FAILING.format(verb=verb, log=log, nth=nth))
        program.chmod(0o755)
        options = MergeOptions(strategy=strategy)
        try:
            disk.merge(["mid.qcow2"], options, qemu=QemuImg(program))
        except FailedMidway as error:
            failed += 1
            assert "merge again" in str(error)
            for path in (disk.paths[0], disk.active):
                assert raw_of(path) == disk.points[path.name]
                assert qemu_check(path)["corruptions"] == 0, path  # clusters may have leaked
            assert {path.name for path in disk.directory.iterdir()} == set(disk.points)
            disk.merge(["mid.qcow2"], options)
            told = True
        else:
            told = False
        assert raw_of(disk.active) == disk.points["top.qcow2"]
        assert qemu_check(disk.active)["corruptions"] == 0
        assert {path.name for path in disk.directory.iterdir()} == {"top.qcow2", "base.qcow2"}
        injected = "INJECTED" in log.read_text()
        assert told or not injected, f"flush {nth} failed unnoticed"
    assert failed, "the injection did not work: nothing was proven"


def test_the_tables_were_not_flushed(tmp_path: Path) -> None:
    """As 7.2 tells it when only the flush after the header's fails: the data may be lost yet."""
    disk = build(tmp_path / "images", LINES, NAMES)
    program = tmp_path / "qemu-img"
    program.write_text(
        "#!/bin/sh\n"
        '[ "$1" = rebase ] && [ "$2" != -u ] || exec qemu-img "$@"\n'
        'qemu-img "$@" || exit\n'
        "echo 'qemu-img: Failed to flush the L2 table cache: Input/output error' >&2\n"
    )
    program.chmod(0o755)
    options = MergeOptions(strategy="pull")
    with pytest.raises(FailedMidway, match=r"Failed to flush.*merge again"):
        disk.merge(["mid.qcow2"], options, qemu=QemuImg(program))
    disk.expect({name: name for name in disk.points})


@pytest.mark.parametrize(
    ("line", "fails"),
    [
        ("qemu-img: Failed to flush the L2 table cache: Input/output error", True),
        ("qemu-img: I/O error", True),
        ("qemu-img: warning: error in the name", False),
        ("qemu-img: it may take a while: terror.qcow2", False),
    ],
)
def test_what_qemu_img_tells_though_it_exits_0(tmp_path: Path, line: str, fails: bool) -> None:
    program = tmp_path / "qemu-img"
    program.write_text(f"#!/bin/sh\necho one >&2\necho '{line}' >&2\n")
    program.chmod(0o755)
    if fails:
        with pytest.raises(FailedMidway, match=r"rror \(exit code 0\)"):
            QemuImg(program).run(["rebase"])
    else:
        QemuImg(program).run(["rebase"])


@pytest.mark.parametrize(("strategy", "names"), [("pull", "kept"), ("commit", "lowest")])
def test_by_which_descriptor_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, names: str
) -> None:
    """By one that was open before qemu-img wrote: only that one hears of a lost page."""
    disk: Disk = build(tmp_path, LINES, NAMES)
    present: Step | None = None
    before: dict[int, tuple[int, int]] = {}
    flushed: dict[str, list[bool]] = {}
    real = os.fsync

    def key(fd: int) -> tuple[int, int]:
        status = os.fstat(fd)
        return status.st_dev, status.st_ino

    def watch(step: Step) -> None:
        nonlocal present
        present = step
        if isinstance(step, Command):
            before.clear()
            for each in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(OSError):
                    before[int(each.name)] = key(int(each.name))

    def fsync(fd: int) -> None:
        if isinstance(present, Sync) and present.path.suffix == ".qcow2":
            status = present.path.stat()
            if key(fd) == (status.st_dev, status.st_ino):  # else the journal's
                flushed.setdefault(present.path.name, []).append(before.get(fd) == key(fd))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    options = MergeOptions(strategy=strategy, names=names)
    disk.merge(["mid.qcow2"], options, before_step=watch)
    assert flushed and all(each[0] for each in flushed.values()), flushed
