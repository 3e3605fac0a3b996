"""Locks: real qemu processes are the other party in every test."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qchain.errors import Refused
from qchain.plan.commands import commit_argv, rebase_unsafe_argv
from qchain.run import locks
from qchain.run.qemu_img import QemuImg

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="needs qemu-img, qemu-io"
)


def create(path: Path, backing: Path | None = None) -> Path:
    argv = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if backing is not None:
        argv += ["-b", backing.name, "-F", "qcow2"]
    subprocess.run([*argv, str(path), *([] if backing else ["1M"])], check=True)
    return path


def works(*argv: str | Path) -> bool:
    return subprocess.run([str(a) for a in argv], capture_output=True).returncode == 0


def writable(image: Path) -> bool:
    return works("qemu-io", "-f", "qcow2", "-c", "write 0 64k", image)


def readable(image: Path) -> bool:
    return works("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 64k", image)


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """base, mid, top."""
    base = create(tmp_path / "base")
    mid = create(tmp_path / "mid", base)
    top = create(tmp_path / "top", mid)
    assert writable(base) and writable(mid) and writable(top)
    return [base, mid, top]


@contextmanager
def qemu_io(*argv: str | Path) -> Iterator[int]:
    """A qemu-io that has the image open for as long as the block lasts."""
    process = subprocess.Popen(
        ["qemu-io", *map(str, argv)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("length\n")
    process.stdin.flush()
    while "MiB" not in (line := process.stdout.readline()):
        assert line, "qemu-io ended"
    try:
        yield process.pid
    finally:
        process.communicate("quit\n")


@contextmanager
def opened(*paths: Path) -> Iterator[list[int]]:
    fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def test_probe_tells_idle_read_and_written(chain: list[Path]) -> None:
    base, mid, top = chain
    with opened(base, mid, top) as fds:
        states = [locks.probe(fd) for fd in fds]
        assert states == [locks.LockState(in_use=False, writer=False)] * 3
        with qemu_io("-f", "qcow2", top):
            states = [locks.probe(fd) for fd in fds]
            assert [s.in_use for s in states] == [True] * 3
            assert [s.writer for s in states] == [False, False, True]
        with qemu_io("-r", "-f", "qcow2", mid):
            states = [locks.probe(fd) for fd in fds]
            assert [s.in_use for s in states] == [True, True, False]
            assert not any(s.writer for s in states)
        with qemu_io("-r", "-U", "-f", "qcow2", mid):
            assert [locks.probe(fd).in_use for fd in fds] == [True, True, False]
        assert not any(locks.probe(fd).in_use for fd in fds)


def test_probe_takes_nothing(chain: list[Path]) -> None:
    with opened(chain[2]) as (fd,):
        locks.probe(fd)
        assert writable(chain[2])


def test_a_reader_of_ours_keeps_writers_out_and_readers_in(chain: list[Path]) -> None:
    top = chain[2]
    with opened(top) as (fd,):
        locks.hold_reader(fd)
        assert not writable(top)
        assert readable(top)
        locks.release(fd)
        assert writable(top)
        locks.hold_reader(fd)
    assert writable(top)  # closing releases


def test_a_writer_of_ours_keeps_all_out(chain: list[Path]) -> None:
    top = chain[2]
    with opened(top) as (fd,):
        locks.hold_writer(fd)
        assert not writable(top)
        assert not readable(top)
        locks.release(fd)
        assert readable(top)


def test_a_qemu_that_writes_refuses_us_and_is_named(chain: list[Path]) -> None:
    top = chain[2]
    with qemu_io("-f", "qcow2", top) as pid, opened(top) as (fd,):
        assert locks.holder_name(fd) == f"qemu-io (pid {pid})"
        for hold in (locks.hold_reader, locks.hold_writer):
            with pytest.raises(Refused, match=rf"top: in use by qemu-io \(pid {pid}\)"):
                hold(fd)
    # What was tried and failed has left nothing behind, the descriptor still open.
    with opened(top) as (fd,):
        with qemu_io("-f", "qcow2", top), pytest.raises(Refused):
            locks.hold_reader(fd)
        assert writable(top)
        assert locks.holder_name(fd) is None


def test_a_qemu_that_reads_refuses_only_our_writer(chain: list[Path]) -> None:
    top = chain[2]
    with qemu_io("-r", "-f", "qcow2", top), opened(top) as (fd,):
        locks.hold_reader(fd)
        with pytest.raises(Refused):
            locks.hold_writer(fd)
        # Still a reader: the failed upgrade took nothing away.
        assert not writable(top)
        with opened(top) as (other,):
            assert locks.probe(other) == locks.LockState(in_use=True, writer=False)
    assert writable(top)


def test_our_own_two_descriptors_are_two_parties(chain: list[Path]) -> None:
    with opened(chain[2], chain[2]) as (one, two):
        locks.hold_reader(one)
        assert locks.probe(two).in_use and not locks.probe(one).in_use
        with pytest.raises(Refused):
            locks.hold_writer(two)
        locks.hold_writer(one)
        assert locks.probe(two).writer


def test_rebase_works_after_the_hand_over_only(chain: list[Path]) -> None:
    base, _, top = chain
    argv = rebase_unsafe_argv(top, "qcow2", base, "qcow2")
    argv.remove("-u")
    with opened(*chain) as fds:
        for fd in fds:
            locks.hold_reader(fd)
        assert not works("qemu-img", *argv)
        locks.release(fds[2])
        assert not writable(chain[0]) and not writable(chain[1])
        QemuImg().run(argv)


def test_commit_works_after_the_hand_over_only(chain: list[Path]) -> None:
    base, mid, top = chain
    with opened(*chain) as fds:
        for fd in fds:
            locks.hold_reader(fd)
        assert not works("qemu-img", *commit_argv(base, top))
        locks.release(fds[0])
        locks.release(fds[2])
        # The intermediate's "consistent read" is in the way.
        assert not works("qemu-img", *commit_argv(base, top))
        locks.keep_unshared(fds[1])
        assert not writable(mid)
        QemuImg().run(commit_argv(base, top))


def test_nobody_else_holds_a_plain_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    with plain.open("rb") as reader, opened(plain) as (fd,):
        assert reader.read() == b"x"
        assert locks.holder_name(fd) is None
        assert not locks.probe(fd).in_use
