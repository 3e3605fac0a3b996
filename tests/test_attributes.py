"""Taking over attributes, and durable changes of names."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from qchain.errors import FailedMidway
from qchain.run import attributes, durable
from qchain.run.attributes import take_attributes

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
acl = pytest.mark.skipif(not shutil.which("setfacl"), reason="needs setfacl")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"s")
    target.write_bytes(b"t")
    return source, target


def getfacl(path: Path) -> str:
    argv = ["getfacl", "-cpn", str(path)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("source_mode", [0o600, 0o640, 0o604, 0o660, 0o4755, 0o444])
@pytest.mark.parametrize("target_mode", [0o600, 0o644, 0o666, 0o400])
def test_mode(pair: tuple[Path, Path], source_mode: int, target_mode: int) -> None:
    source, target = pair
    source.chmod(source_mode)
    target.chmod(target_mode)
    take_attributes(source, target)
    assert stat.S_IMODE(target.stat().st_mode) == source_mode
    assert stat.S_IMODE(source.stat().st_mode) == source_mode
    assert target.read_bytes() == b"t"


@root
def test_owner_group_and_set_user_bit(pair: tuple[Path, Path]) -> None:
    source, target = pair
    os.chown(source, 1234, 5678)
    source.chmod(0o4750)
    take_attributes(source, target)
    status = target.stat()
    # A change of owner clears the set-user bit: it must be set after.
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 5678, 0o4750)


def test_user_attributes_come_change_and_go(pair: tuple[Path, Path]) -> None:
    source, target = pair
    try:
        os.setxattr(source, "user.both", b"new")
    except OSError:
        pytest.skip("no extended attributes here")
    os.setxattr(source, "user.binary", bytes(range(256)))
    os.setxattr(source, "user.empty", b"")
    os.setxattr(target, "user.both", b"old")
    os.setxattr(target, "user.extra", b"x")
    for _ in range(2):
        take_attributes(source, target)
        found = {n: os.getxattr(target, n) for n in os.listxattr(target) if n.startswith("user.")}
        assert found == {
            "user.both": b"new",
            "user.binary": bytes(range(256)),
            "user.empty": b"",
        }


@root
def test_security_labels_and_trusted_attributes(pair: tuple[Path, Path]) -> None:
    source, target = pair
    label = b"system_u:object_r:virt_image_t:s0\0"
    os.setxattr(source, "security.selinux", label)
    os.setxattr(source, "trusted.libvirt.security.dac", b"+0:+0")
    os.setxattr(target, "trusted.extra", b"x")
    take_attributes(source, target)
    assert os.getxattr(target, "security.selinux") == label
    assert os.getxattr(target, "trusted.libvirt.security.dac") == b"+0:+0"
    assert "trusted.extra" not in os.listxattr(target)


@acl
@pytest.mark.parametrize("on", ["source", "target", "both"])
def test_acl(pair: tuple[Path, Path], on: str) -> None:
    source, target = pair
    if on in ("source", "both"):
        subprocess.run(["setfacl", "-m", "u:1234:rw,g:99:r,m::rw", source], check=True)
    if on in ("target", "both"):
        subprocess.run(["setfacl", "-m", "u:77:rwx,o::r", target], check=True)
    take_attributes(source, target)
    assert getfacl(target) == getfacl(source)
    assert "77" not in getfacl(target)


def readers(path: Path, uid: int, gid: int) -> bool:
    """Whether that user can really read the file; asked of the kernel in a child."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            os.close(os.open(path, os.O_RDONLY))
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@root
@acl
@pytest.mark.parametrize(
    ("source_mode", "target_mode", "source_acl", "target_acl"),
    [
        (0o640, 0o644, None, None),
        (0o604, 0o640, None, None),
        (0o644, 0o600, None, None),
        (0o600, 0o666, None, None),
        (0o640, 0o640, "u:1003:r", None),
        (0o600, 0o640, None, "u:1003:r,g::---"),
        (0o644, 0o644, "u:1003:---", None),
        (0o640, 0o640, "u:1002:r,g::---", "u:1003:r,g::---"),
    ],
)
def test_never_open_to_anybody_new(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source_mode: int,
    target_mode: int,
    source_acl: str | None,
    target_acl: str | None,
) -> None:
    """Before and after every system call, five users really try."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory != Path("/") and directory.stat().st_mode & 0o077 == 0:
            directory.chmod(directory.stat().st_mode | 0o011)
    source, target = tmp_path / "source", tmp_path / "target"
    for path, owner, mode, entries in (
        (source, 1000, source_mode, source_acl),
        (target, 1001, target_mode, target_acl),
    ):
        path.write_bytes(b"x")
        os.chown(path, owner, owner)
        path.chmod(mode)
        if entries:
            subprocess.run(["setfacl", "-m", entries, path], check=True)
    users = [(1000, 1000), (1001, 1001), (1002, 1000), (1002, 1001), (1003, 1003)]
    allowed = {u for u in users if readers(source, *u) or readers(target, *u)}
    source_readers = {u for u in users if readers(source, *u)}
    moments = 0

    def look() -> None:
        nonlocal moments
        moments += 1
        assert {u for u in users if readers(target, *u)} <= allowed

    for name in ("fchmod", "fchown", "setxattr", "removexattr"):

        def watched(*args: object, real: object = getattr(os, name), **kw: object) -> None:
            look()
            real(*args, **kw)  # type: ignore[operator]
            look()

        monkeypatch.setattr(attributes.os, name, watched)
    take_attributes(source, target)
    assert moments >= 6
    assert {u for u in users if readers(target, *u)} == source_readers


def test_errors_name_the_file(tmp_path: Path) -> None:
    present = tmp_path / "present"
    present.write_bytes(b"")
    with pytest.raises(FailedMidway, match="absent: cannot read its attributes: no such file"):
        take_attributes(tmp_path / "absent", present)
    (tmp_path / "link").symlink_to(present)
    with pytest.raises(FailedMidway, match="link: cannot set its attributes"):
        take_attributes(present, tmp_path / "link")


def test_rename_replaces_and_flushes_file_and_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source, target = tmp_path / "a" / "x", tmp_path / "b" / "y"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    inode = source.stat().st_ino
    events: list[tuple[str, bool]] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        events.append((os.path.relpath(path, tmp_path), source.exists()))
        real(fd)

    monkeypatch.setattr(durable.os, "fsync", fsync)
    durable.rename_durably(source, target)
    assert target.read_bytes() == b"new" and target.stat().st_ino == inode
    # The file before the rename, the directories after.
    assert events == [("a/x", True), ("b", False), ("a", False)]


def test_write_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "journal"
    durable.write_durably(journal, b"one")
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600

    def fail(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", fail)
        with pytest.raises(FailedMidway, match="cannot flush: input/output error"):
            durable.write_durably(journal, b"two")
    assert journal.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["journal"]


def test_a_name_goes_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    durable.unlink_durably(file)
    durable.unlink_durably(file)
    assert not file.exists()
