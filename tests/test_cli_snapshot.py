"""`qchain snapshot`: rows T1, T2 and T15."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
from cli_runner import run
from merging import Disk, build

from fixtures.oracle import qemu_img, qemu_info, qemu_io, raw_of
from qchain.chain.chain import open_chain
from qchain.errors import FailedMidway
from qchain.run.qemu_img import QemuImg
from qchain.run.snapshot import take_snapshot

LAYERS = {"qcow2": ["64k:A 64k:-", "32k:B 96k:-"], "raw": ["[raw] 64k:A 64k:-"]}


def made(directory: Path, fmt: str = "qcow2") -> Disk:
    names = ["base.qcow2", "live.qcow2"] if fmt == "qcow2" else ["live.raw"]
    return build(directory, LAYERS[fmt], names)


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_t1(fmt: str, tmp_path: Path) -> None:
    disk = made(tmp_path / "d", fmt)
    before = disk.active.read_bytes()
    disk.active.chmod(0o640)
    result = run("snapshot", disk.active, "--name", "s1.qcow2", "--json")
    assert result.code == 0, result.err
    new = disk.directory / "s1.qcow2"
    assert result.json == {"active": str(new), "backing": str(disk.active)}
    point = disk.active.name
    disk.expect({**{p.name: p.name for p in disk.paths}, "s1.qcow2": point})
    assert disk.backing_of("s1.qcow2") == (point, fmt)
    assert disk.active.read_bytes() == before
    assert stat.S_IMODE(new.stat().st_mode) == 0o640


def test_t2_three_in_a_row(tmp_path: Path) -> None:
    disk = made(tmp_path / "d")
    live = disk.active
    for number in (1, 2, 3):
        assert run("snapshot", live, "--name", f"s{number}.qcow2").code == 0
        live = live.with_name(f"s{number}.qcow2")
    names = [layer.path.name for layer in open_chain(live).layers]
    assert names == ["s3.qcow2", "s2.qcow2", "s1.qcow2", "live.qcow2", "base.qcow2"]
    assert raw_of(live) == disk.points["live.qcow2"]


def test_t15_keeps_the_live_name(tmp_path: Path) -> None:
    disk = made(tmp_path / "d")
    disk.active.chmod(0o604)
    os.setxattr(disk.active, "user.label", b"x")
    inode = disk.active.stat().st_ino
    result = run("snapshot", disk.active, "--name", "b.qcow2", "--keep-active-name")
    assert result.code == 0, result.err
    disk.expect({"base.qcow2": "base.qcow2", "b.qcow2": "live.qcow2", "live.qcow2": "live.qcow2"})
    assert disk.backing_of("live.qcow2") == ("b.qcow2", "qcow2")
    assert (disk.directory / "b.qcow2").stat().st_ino == inode
    assert stat.S_IMODE(disk.active.stat().st_mode) == 0o604
    assert os.getxattr(disk.active, "user.label") == b"x"
    qemu_io(disk.active, ["write -q -P 7 0 64k"], "qcow2")
    assert raw_of(disk.directory / "b.qcow2") == disk.points["live.qcow2"]


def test_another_directory(tmp_path: Path) -> None:
    disk = made(tmp_path / "d")
    new = tmp_path / "elsewhere.qcow2"
    assert run("snapshot", disk.active, "--name", new).code == 0
    assert qemu_info(new)["backing-filename"] == str(disk.active)
    assert raw_of(new) == disk.points["live.qcow2"]


def test_refused(tmp_path: Path) -> None:
    disk = made(tmp_path / "d")
    live = disk.active
    untouched = {path.name: path.name for path in disk.paths}
    assert "exists" in run("snapshot", live, "--name", "base.qcow2").fails(3)
    kept = ("--keep-active-name",)
    assert "exists" in run("snapshot", live, "--name", "base.qcow2", *kept).fails(3)
    assert "directory" in run("snapshot", live, "--name", tmp_path / "no" / "x").fails(2)
    far = run("snapshot", live, "--name", tmp_path / "x.qcow2", *kept)
    assert "beside" in far.fails(3)
    writer = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(live)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdin.write(b"read 0 512\n")
        writer.stdin.flush()
        writer.stdout.readline()
        assert "in use" in run("snapshot", live, "--name", "s.qcow2").fails(3)
    finally:
        writer.communicate(b"quit\n")
    disk.expect(untouched)
    other = disk.directory / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "live.qcow2", "-F", "qcow2", other)
    said = run("snapshot", live, "--name", "b.qcow2", *kept).fails(3)
    assert "other.qcow2: backs on live.qcow2" in said
    disk.expect(untouched, complete=False)


def tmp_drafts(directory: Path) -> list[Path]:
    return list(directory.glob(".qchain-*"))


class Idle(QemuImg):
    """Makes an image of nothing, and says that all went well."""

    def run(self, argv, progress=None, cwd=None, pass_fds=()):  # type: ignore[no-untyped-def]
        (made,) = tmp_drafts(Path(cwd))
        qemu_img("create", "-q", "-f", "qcow2", made, argv[-1])


def test_an_overlay_that_shows_something_else_is_not_used(tmp_path: Path) -> None:
    disk = made(tmp_path / "d")
    with open_chain(disk.active) as chain, pytest.raises(FailedMidway, match="does not read as"):
        take_snapshot(chain, disk.directory / "s.qcow2", qemu=Idle())
    disk.expect({path.name: path.name for path in disk.paths})


def test_a_failure_takes_the_second_name_back(tmp_path: Path) -> None:
    disk = made(tmp_path / "d")
    with open_chain(disk.active) as chain, pytest.raises(FailedMidway, match="does not read as"):
        take_snapshot(chain, disk.directory / "b.qcow2", keep_active_name=True, qemu=Idle())
    disk.expect({path.name: path.name for path in disk.paths})
    assert disk.active.stat().st_nlink == 1


class Killed(BaseException):
    """Everything stops here."""


def test_stopped_after_the_link_and_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = made(tmp_path / "d")

    class Stops(QemuImg):
        def run(self, argv, progress=None, cwd=None, pass_fds=()):  # type: ignore[no-untyped-def]
            raise Killed

    with open_chain(disk.active) as chain, pytest.raises(Killed):
        take_snapshot(chain, disk.directory / "b.qcow2", keep_active_name=True, qemu=Stops())
    assert raw_of(disk.active) == disk.points["live.qcow2"]
    result = run("snapshot", disk.active, "--name", "b.qcow2", "--keep-active-name")
    assert result.code == 0, result.err
    disk.expect({"base.qcow2": "base.qcow2", "b.qcow2": "live.qcow2", "live.qcow2": "live.qcow2"})


def test_a_second_branch_is_pointed_out(tmp_path: Path) -> None:
    disk = made(tmp_path / "d")
    result = run("snapshot", disk.active, "--name", "s1.qcow2")
    assert (result.code, result.err) == (0, "")
    result = run("snapshot", disk.active, "--name", "s2.qcow2", "--json")
    assert result.code == 0 and result.json["backing"] == str(disk.active)
    assert result.err == (
        f"qchain: {disk.active}: s1.qcow2 backs on it already; s2.qcow2 begins another branch\n"
    )
    for name in ("a", "b", "c", "d"):
        live = disk.active.name
        qemu_img("create", "-q", "-f", "qcow2", "-b", live, "-F", "qcow2", disk.directory / name)
    result = run("snapshot", disk.active, "--name", "s3.qcow2")
    assert result.code == 0 and "a, b, c, d, s1.qcow2 and 1 more back on it already;" in result.err
