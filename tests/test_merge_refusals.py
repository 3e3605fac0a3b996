"""Every reason not to merge: the plan says it, nothing is done, no byte and no name changes.

Each is tried by the library and by the command (exit 3), and the same chain without the
defect does merge: so it was the defect that was refused.
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from merging import Disk, build
from qchain_cli.main import main

from fixtures.language import parse_layer
from fixtures.oracle import qemu_img, qemu_io, raw_of
from qchain.chain.chain import FormatNotRecorded, open_chain
from qchain.chain.gate import Gate
from qchain.errors import ExitCode, Refused, UsageError
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Request
from qchain.run.execute import execute

LINES = ["256k:A 64k:- 64k:B", "64k:- 128k:C", "64k:D 128k:- 64k:D"]
MERGES = [("pull", "kept"), ("commit", "kept"), ("commit", "lowest")]


def chain_in(directory: Path) -> Disk:
    return build(directory, LINES, ("base", "mid", "top"))


def state(*directories: Path) -> dict[str, tuple[Any, ...]]:
    """All names, contents, modes and times below the directories."""
    found: dict[str, tuple[Any, ...]] = {}
    for directory in directories:
        for path in (directory, *directory.rglob("*")):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            digest = hashlib.sha256(content).hexdigest()
            found[str(path)] = (digest, status.st_mode, status.st_mtime_ns, status.st_ino)
    return found


def plan_of(
    active: Path, drop: Sequence[str], options: MergeOptions | None = None, gate: Gate | None = None
) -> tuple[str, ...]:
    """The refusals; that `execute` obeys them is tried as well."""
    with open_chain(active, gate) as chain:
        plan = make_plan(chain, Request(drop=tuple(drop)), options)
        if plan.refusals:
            assert plan.steps == [] and plan.as_json()["refusals"] == list(plan.refusals)
            with pytest.raises(Refused) as caught:
                execute(plan, chain)
            assert caught.value.exit_code == ExitCode.REFUSED
    return plan.refusals


def command(active: Path, drop: Sequence[str], *more: str) -> int:
    drops = [word for name in drop for word in ("--drop", name)]
    return main(["merge", str(active), *drops, "--yes", *more])


# --- marks and contents of a file ----------------------------------------------------


def set_feature(path: Path, bit: int) -> None:
    """Set a bit of `incompatible_features`."""
    with path.open("r+b") as file:
        file.seek(72)
        value = struct.unpack(">Q", file.read(8))[0]
        file.seek(72)
        file.write(struct.pack(">Q", value | 1 << bit))


def unrecord_format(path: Path) -> None:
    """Turn the header extension with the backing format into one that nobody knows."""
    data = path.read_bytes()
    at = data.index(struct.pack(">I", 0xE2792ACA), 100, 4096)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(">I", 0x51434841))


def encrypt(path: Path) -> None:
    """Another image under the name, the same but encrypted."""
    options = "encrypt.format=aes,encrypt.key-secret=s"  # LUKS would derive keys for seconds
    argv = ["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o", options]
    below = {"mid.qcow2": "base.qcow2", "top.qcow2": "mid.qcow2"}.get(path.name)
    argv += [] if below is None else ["-u", "-b", below, "-F", "qcow2"]
    path.unlink()
    qemu_img(*argv, path, "384k")


def with_data_file(path: Path) -> None:
    below = {"mid.qcow2": "base.qcow2", "top.qcow2": "mid.qcow2"}.get(path.name)
    argv = ["create", "-q", "-f", "qcow2", "-o", f"data_file={path}.data"]
    argv += [] if below is None else ["-u", "-b", below, "-F", "qcow2"]
    path.unlink()
    qemu_img(*argv, path, "384k")


def snapshot(path: Path) -> None:
    qemu_img("snapshot", "-c", "before", path)


def bitmap(path: Path) -> None:
    qemu_img("bitmap", "-f", "qcow2", "--add", path, "b0")


def linked(path: Path) -> None:
    (path.parent / "other-name").hardlink_to(path)


def moved_behind_a_link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real").name)


@dataclass(frozen=True)
class Defect:
    """`spoil` makes it, in the file `where`; `reason` is what the plan must say."""

    name: str
    spoil: Callable[[Path], None]
    reason: str
    where: tuple[str, ...] = ("top", "mid")


DEFECTS = [
    Defect("corrupt", lambda p: set_feature(p, 1), "corrupt", ("top", "mid")),
    Defect("dirty", lambda p: set_feature(p, 0), "not closed properly"),
    Defect("encrypted", encrypt, "encrypted"),
    Defect("data file", with_data_file, "external data file"),
    Defect("snapshot", snapshot, "internal snapshot"),
    Defect("bitmap", bitmap, "bitmaps", ("mid",)),
    Defect("hard link", linked, "hard links"),
]


@pytest.mark.parametrize(
    ("defect", "where"),
    [(defect, where) for defect in DEFECTS for where in defect.where],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_file_that_is_not_fit(tmp_path: Path, defect: Defect, where: str) -> None:
    disk = chain_in(tmp_path)
    assert plan_of(disk.active, ["mid.qcow2"]) == ()
    defect.spoil(tmp_path / f"{where}.qcow2")
    before = state(tmp_path)
    for strategy, names in MERGES:
        options = MergeOptions(strategy=strategy, names=names, allow_format_change=True)
        refusals = plan_of(disk.active, ["mid.qcow2"], options)
        assert any(defect.reason in line and f"{where}." in line for line in refusals), refusals
        asked = ("--strategy", strategy, "--names", names, "--allow-format-change")
        assert command(disk.active, ["mid.qcow2"], *asked) == ExitCode.REFUSED
    assert state(tmp_path) == before


# Nobody can read the points of a chain with an encrypted or a corrupt base.
READABLE = [defect for defect in DEFECTS if defect.name not in ("encrypted", "corrupt")]


@pytest.mark.parametrize("defect", READABLE, ids=lambda defect: defect.name)
def test_the_same_below_the_group_harms_nothing(tmp_path: Path, defect: Defect) -> None:
    """The new backing is only read: what it is marked with is none of our business."""
    disk = chain_in(tmp_path)
    defect.spoil(tmp_path / "base.qcow2")
    if defect.name == "data file":
        disk.points["top.qcow2"] = raw_of(disk.active)
    disk.merge(["mid.qcow2"], MergeOptions(strategy="pull"))
    disk.expect({"top.qcow2": "top.qcow2"}, complete=False)
    assert not (tmp_path / "mid.qcow2").exists()


@pytest.mark.parametrize("strategy", ["commit", "pull", "auto"])
def test_bitmaps_of_the_kept_image_stay_or_it_is_refused(tmp_path: Path, strategy: str) -> None:
    disk = chain_in(tmp_path)
    bitmap(disk.active)
    before = state(tmp_path)
    options = MergeOptions(strategy=strategy)
    if strategy == "commit":
        assert any("bitmaps" in line for line in plan_of(disk.active, ["mid.qcow2"], options))
        assert state(tmp_path) == before
    else:
        disk.merge(["mid.qcow2"], options)
        disk.expect({"top.qcow2": "top.qcow2", "base.qcow2": "base.qcow2"})
        assert "b0" in qemu_img("info", "-f", "qcow2", disk.active).stdout


@pytest.mark.parametrize("where", ["top", "mid"])
def test_a_backing_format_that_is_not_recorded(tmp_path: Path, where: str) -> None:
    disk = chain_in(tmp_path)
    unrecord_format(tmp_path / f"{where}.qcow2")
    before = state(tmp_path)
    with pytest.raises(FormatNotRecorded):
        open_chain(disk.active)
    refusals = plan_of(disk.active, ["mid.qcow2"], gate=Gate(assume_format="qcow2"))
    assert any(f"{where}.qcow2" in line and "not recorded" in line for line in refusals), refusals
    assert command(disk.active, ["mid.qcow2"]) == ExitCode.REFUSED
    assert state(tmp_path) == before


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_may_not_be_written(what: str) -> None:
    """Root may write to everything: then an ordinary user does the planning."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "images"
        disk = chain_in(directory)
        Path(temporary).chmod(0o755)
        directory.chmod(0o555 if what == "directory" else 0o777)
        for path in disk.paths:
            path.chmod(0o444 if what == "file" else 0o666)
        before = state(directory)
        lines = as_ordinary_user(lambda: plan_of(disk.active, ["mid.qcow2"]))
        directory.chmod(0o755)
        assert "cannot be written to" in lines
        assert {k: v[0] for k, v in state(directory).items()} == {
            k: v[0] for k, v in before.items()
        }


def as_ordinary_user(function: Callable[[], Sequence[str]]) -> str:
    """What `function` returns, joined, or the error it raises; called in a child."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            answer = "\n".join(function())
        except BaseException as error:
            answer = f"error {error!r}"
        os.write(writable, answer.encode()[:60000])
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = chain_in(tmp_path)
    before = state(tmp_path)
    true = os.statvfs(tmp_path)
    full = os.statvfs_result((*true[:3], 0, 0, *true[5:]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _path: full)
        refusals = plan_of(disk.active, ["mid.qcow2"])
        assert len(refusals) == 1 and "0 are free" in refusals[0]
        assert command(disk.active, ["mid.qcow2"]) == ExitCode.REFUSED
    assert state(tmp_path) == before
    assert plan_of(disk.active, ["mid.qcow2"]) == ()


def test_a_merge_that_was_not_finished(tmp_path: Path) -> None:
    disk = chain_in(tmp_path)
    (tmp_path / ".qchain-abcdef.journal").write_text("{}")
    before = state(tmp_path)
    refusals = plan_of(disk.active, ["mid.qcow2"])
    assert len(refusals) == 1 and "not finished" in refusals[0]
    assert state(tmp_path) == before


# --- overlays outside of the plan ------------------------------------------------------


def overlay(path: Path, backing: str | Path) -> bytes:
    """A clone of an image of the chain; what it reads."""
    path.parent.mkdir(exist_ok=True)
    qemu_img("create", "-q", "-f", "qcow2", "-b", backing, "-F", "qcow2", path)
    qemu_io(path, ["write -q -P 7 0 64k"], "qcow2")
    return raw_of(path)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("where", [".", "clones"])
def test_an_overlay_of_a_dropped_image(tmp_path: Path, where: str, absolute: bool) -> None:
    images = tmp_path / "images"
    disk = chain_in(images)
    clone = Path(os.path.normpath(images / where / "clone.qcow2"))
    mid = images / "mid.qcow2"
    clone.parent.mkdir(exist_ok=True)
    old = overlay(clone, mid if absolute else os.path.relpath(mid, clone.parent))
    before = state(tmp_path)
    for strategy, names in MERGES:
        options = MergeOptions(strategy=strategy, names=names, scan=(clone.parent,))
        refusals = plan_of(disk.active, ["mid.qcow2"], options)
        assert any("clone.qcow2" in r and "mid.qcow2" in r for r in refusals), refusals
    assert command(disk.active, ["mid.qcow2"], "--scan", str(clone.parent)) == ExitCode.REFUSED
    if where == ".":
        assert command(disk.active, ["mid.qcow2"]) == ExitCode.REFUSED
    assert state(tmp_path) == before
    assert raw_of(clone) == old


def test_an_overlay_in_the_directory_of_another_layer(tmp_path: Path) -> None:
    """The images' own directories are looked through, all of them, without --scan."""
    here, there = tmp_path / "here", tmp_path / "there"
    disk = chain_in(there)
    here.mkdir()
    top = here / "top.qcow2"
    overlay(top, disk.active)
    overlay(there / "clone.qcow2", "top.qcow2")
    refusals = plan_of(top, [str(disk.active)], gate=Gate(allow=(there,)))
    assert len(refusals) == 1 and "clone.qcow2" in refusals[0]


@pytest.mark.parametrize(("strategy", "names"), MERGES)
def test_an_overlay_of_the_kept_image(tmp_path: Path, strategy: str, names: str) -> None:
    """Where its name stays it reads on; where the name goes it would be cut off: refused."""
    disk = chain_in(tmp_path)
    old = overlay(tmp_path / "clone.qcow2", "top.qcow2")
    options = MergeOptions(strategy=strategy, names=names)
    if names == "kept":
        disk.merge(["mid.qcow2"], options)
        disk.expect({"top.qcow2": "top.qcow2", "base.qcow2": "base.qcow2"}, complete=False)
    else:
        before = state(tmp_path)
        refusals = plan_of(disk.active, ["mid.qcow2"], options)
        assert any("clone.qcow2" in line for line in refusals)
        assert state(tmp_path) == before
    assert raw_of(tmp_path / "clone.qcow2") == old


def test_an_overlay_of_the_new_backing_is_welcome(tmp_path: Path) -> None:
    disk = chain_in(tmp_path)
    old = overlay(tmp_path / "clone.qcow2", "base.qcow2")
    disk.merge(["mid.qcow2"])
    assert raw_of(tmp_path / "clone.qcow2") == old
    disk.expect({"top.qcow2": "top.qcow2", "base.qcow2": "base.qcow2"}, complete=False)


# --- in use ----------------------------------------------------------------------------


@contextmanager
def opened_by_qemu(*flags: str | Path) -> Iterator[None]:
    """A qemu-io that has an image open for as long as the block lasts."""
    process = subprocess.Popen(
        ["qemu-io", *map(str, flags)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("length\n")
    process.stdin.flush()
    while "KiB" not in (line := process.stdout.readline()):
        assert line, "qemu-io ended"
    try:
        yield
    finally:
        process.communicate("quit\n")


USERS = [
    ("a guest", "top", ()),
    ("a reader of the active image", "top", ("-r",)),
    ("a writer to a dropped image", "mid", ()),
    ("a reader of a dropped image", "mid", ("-r",)),
    ("one who looks at a dropped image", "mid", ("-r", "-U")),
    ("a writer to the new backing", "base", ()),
]


@pytest.mark.parametrize(("strategy", "names"), MERGES)
@pytest.mark.parametrize(("_who", "image", "flags"), USERS, ids=[user[0] for user in USERS])
def test_an_image_in_use(
    tmp_path: Path, _who: str, image: str, flags: tuple[str, ...], strategy: str, names: str
) -> None:
    disk = chain_in(tmp_path)
    options = MergeOptions(strategy=strategy, names=names)
    with opened_by_qemu("-f", "qcow2", *flags, tmp_path / f"{image}.qcow2"):
        before = state(tmp_path)
        with pytest.raises(Refused, match="in use") as caught:
            disk.merge(["mid.qcow2"], options)
        assert "qemu-io" in str(caught.value)
        assert f"{image}.qcow2" in str(caught.value)
        asked = ("--strategy", strategy, "--names", names)
        assert command(disk.active, ["mid.qcow2"], *asked) == ExitCode.REFUSED
        assert state(tmp_path) == before
    disk.merge(["mid.qcow2"], options)


def test_a_reader_of_the_new_backing_is_welcome(tmp_path: Path) -> None:
    disk = chain_in(tmp_path)
    with opened_by_qemu("-r", "-f", "qcow2", tmp_path / "base.qcow2"):
        disk.merge(["mid.qcow2"])
    disk.expect({"top.qcow2": "top.qcow2", "base.qcow2": "base.qcow2"})


# --- ways that are not possible ------------------------------------------------------------


@dataclass(frozen=True)
class Impossible:
    lines: tuple[str, ...]
    drop: tuple[str, ...]
    options: MergeOptions
    reason: str
    names: tuple[str, ...] = field(default=("base", "mid", "top"))


IMPOSSIBLE = {
    "raw under a qcow2 name": Impossible(
        ("[raw] 256k:A", "64k:B", "64k:C"),
        ("base.raw", "mid.qcow2"),
        MergeOptions(strategy="commit"),
        "--allow-format-change",
    ),
    "raw under a name that is recorded": Impossible(
        ("[raw] 256k:A", "64k:B", "64k:C"),
        ("base.raw",),
        MergeOptions(strategy="commit", allow_format_change=True),
        "use --names lowest",
    ),
    "v2 that would have to grow": Impossible(
        ("1M:A", "[v2 size=256k] 64k:B", "[size=512k] 64k:C"),
        ("mid.qcow2",),
        MergeOptions(strategy="commit"),
        "compat 0.10",
    ),
    "no middle": Impossible(
        ("256k:A", "64k:B", "64k:C"),
        ("mid.qcow2",),
        MergeOptions(strategy="both"),
        "no target for --strategy both",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE.values(), ids=list(IMPOSSIBLE))
def test_a_strategy_that_is_not_possible(tmp_path: Path, case: Impossible) -> None:
    disk = build(tmp_path, [parse_layer(line) for line in case.lines], case.names)
    before = state(tmp_path)
    refusals = plan_of(disk.active, case.drop, case.options)
    assert len(refusals) == 1 and case.reason in refusals[0], refusals
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    "request_",
    [
        Request(),
        Request(drop=("mid.qcow2",), flatten=True),
        Request(drop=("top.qcow2",)),
        Request(drop=("nobody.qcow2",)),
        Request(keep=("nobody.qcow2",)),
    ],
    ids=str,
)
def test_requests_that_make_no_sense(tmp_path: Path, request_: Request) -> None:
    disk = chain_in(tmp_path)
    before = state(tmp_path)
    with pytest.raises(UsageError):
        disk.plan(request_)
    assert state(tmp_path) == before


def test_one_group_that_cannot_be_merged_stops_all(tmp_path: Path) -> None:
    """base and mid are dropped in two groups; the lower one's image is marked corrupt."""
    names = ("base", "low", "mid", "top")
    disk = build(tmp_path, [*LINES, "64k:E"], names)
    set_feature(tmp_path / "base.qcow2", 0)
    before = state(tmp_path)
    with open_chain(disk.active) as chain:
        plan: Plan = make_plan(chain, Request(drop=("base.qcow2", "mid.qcow2")))
        assert len(plan.groups) == 2
        with pytest.raises(Refused):
            execute(plan, chain)
    assert state(tmp_path) == before
