"""Nobody gets in between qchain and qemu-img: not before it begins, not when it has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from merging import Disk, build

from fixtures.oracle import qemu_img, qemu_io, raw_of
from qchain.chain.chain import open_chain
from qchain.errors import FailedMidway
from qchain.plan.commands import (
    commit_argv,
    rebase_safe_argv,
    rebase_unsafe_argv,
    resize_shrink_argv,
    unlocked_argv,
)
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.run import locking
from qchain.run.execute import execute
from qchain.run.locks import LockState, hold_writer
from qchain.run.qemu_img import QemuImg
from qchain.run.recover import journals_at, recover

# Two L2 tables; the active image has the first only.
LINES = ["[cluster=4k size=8M] 512k:A", "64k:- 128k:B", "[cluster=4k] 64k:C 64k:- 64k:C"]
NAMES = ("base", "mid", "top")
FAR = 4 << 20
MERGES = [("commit", "kept", "commit"), ("commit", "lowest", "commit"), ("pull", "kept", "rebase")]

# Somebody who tries to write to the active image before and after the command.
GAP = """#!/bin/bash
[ "$1" = {verb} ] && [ "$2" != -u ] || exec qemu-img "$@"
try() {{
    qemu-io -f qcow2 -c 'write -q -P 0xee {far} 64k' {image} >/dev/null 2>{log}.err &&
        echo $1 >> {log}
}}
[ {when} = before ] && try before
qemu-img "$@"
status=$?
[ {when} = after ] && try after
exit $status
"""


def gap(disk: Disk, verb: str, when: str, directory: Path) -> QemuImg:
    program = directory / "qemu-img"
    words = {"verb": verb, "image": disk.active, "when": when, "log": directory / "log"}
    program.write_text(GAP.format(far=FAR, **words))
    program.chmod(0o755)
    return QemuImg(program)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("strategy", "names", "verb"), MERGES)
def test_a_guest_that_starts_beside_qemu_img(
    tmp_path: Path, strategy: str, names: str, verb: str, when: str
) -> None:
    disk = build(tmp_path / "images", LINES, NAMES)
    options = MergeOptions(strategy=strategy, names=names)
    disk.merge(["mid.qcow2"], options, qemu=gap(disk, verb, when, tmp_path))
    assert not (tmp_path / "log").exists(), "somebody could write"
    assert 'Failed to get "write" lock' in (tmp_path / "log.err").read_text()
    result = "top.qcow2" if names == "kept" else "mid.qcow2"
    disk.expect({result: "top.qcow2", "base.qcow2": "base.qcow2"})


@pytest.mark.parametrize("verify", ["moved", "full"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("strategy", "names", "verb"), MERGES)
def test_without_locks_a_write_in_between_is_not_lost(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    names: str,
    verb: str,
    when: str,
    verify: str,
) -> None:
    """On a file system that has none: the merge sees it, and what was written stays."""
    disk = build(tmp_path / "images", LINES, NAMES)
    none = LockState(in_use=False, writer=False, known=False)
    monkeypatch.setattr(locking, "probe", lambda fd: none)
    options = MergeOptions(strategy=strategy, names=names, verify=verify)
    with pytest.raises(FailedMidway):
        disk.merge(["mid.qcow2"], options, qemu=gap(disk, verb, when, tmp_path))
    assert (tmp_path / "log").exists(), "nobody wrote: nothing was proven"
    expected = bytearray(disk.points["top.qcow2"])
    expected[FAR : FAR + 65536] = b"\xee" * 65536
    assert raw_of(disk.active) == bytes(expected)
    assert {path.name for path in disk.directory.iterdir()} == set(disk.points)


def test_the_locks_outlive_qchain(tmp_path: Path) -> None:
    """Killed while qemu-img works: as long as that writes, nobody else may."""
    disk = build(tmp_path / "images", LINES, NAMES)
    program = tmp_path / "qemu-img"
    started, go = tmp_path / "started", tmp_path / "go"
    program.write_text(
        '#!/bin/bash\n[ "$1" = rebase ] && [ "$2" != -u ] || exec qemu-img "$@"\n'
        f"touch {started}\nwhile [ ! -e {go} ]; do sleep 0.02; done\n"
        f'qemu-img "$@"\ntouch {go}.done\n'
    )
    program.chmod(0o755)
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=("mid.qcow2",)), MergeOptions(strategy="pull"))
        child = os.fork()
        if child == 0:
            try:
                execute(plan, chain, QemuImg(program))
            finally:
                os._exit(0)
    wait_for(started)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    write = ["qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", disk.active]
    done = subprocess.run(write, capture_output=True, text=True, check=False)
    assert 'Failed to get "write" lock' in done.stderr
    go.touch()
    wait_for(Path(f"{go}.done"))
    time.sleep(0.2)  # the shell ends
    recover(journals_at(disk.directory))
    disk.expect({"top.qcow2": "top.qcow2", "base.qcow2": "base.qcow2"})


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["plain", "a,b", "a:b", "-f", "x=y,file.locking=on", "ü \n"])
def test_commands_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """While we hold a writer's locks: the command as it is fails, this one does the same."""
    monkeypatch.chdir(tmp_path)
    base, top = tmp_path / "base", tmp_path / name
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", top)
    qemu_io(top, ["write -q -P 5 0 64k"], "qcow2")
    fd = os.open(top, os.O_RDONLY)
    hold_writer(fd)
    try:
        for argv in (
            commit_argv(base, top),
            rebase_unsafe_argv(top, "qcow2", "base", "qcow2"),
            rebase_unsafe_argv(name, "qcow2", "base", "qcow2"),
            rebase_safe_argv(top, "base", "base", "qcow2"),
            resize_shrink_argv(top, "qcow2", 512 << 10),
        ):
            held = subprocess.run(["qemu-img", *argv], capture_output=True, text=True, check=False)
            assert 'Failed to get "write" lock' in held.stderr, argv
            subprocess.run(["qemu-img", *unlocked_argv(argv)], capture_output=True, check=True)
    finally:
        os.close(fd)
    assert raw_of(base)[:65536] == b"\x05" * 65536
    assert len(raw_of(top)) == 512 << 10
