"""Where files lie and what lies beside them: what a merge could not do to its end is refused.

Each of these once failed after the switch, or on every try to finish it.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from merging import build
from test_merge_refusals import (
    DEFECTS,
    LINES,
    Defect,
    as_ordinary_user,
    chain_in,
    plan_of,
    state,
)

from fixtures.oracle import qemu_img, qemu_info, raw_of
from qchain.chain.chain import open_chain
from qchain.chain.gate import Gate
from qchain.errors import FailedMidway
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import HardLink, Rename, Step
from qchain.run.execute import execute

# --- one filesystem, mounted at several places ---------------------------------------------


@contextlib.contextmanager
def mounted(*places: tuple[Path, Path]) -> Iterator[None]:
    """Bind mounts (what, where)."""
    with contextlib.ExitStack() as stack:
        for what, where in places:
            subprocess.run(["mount", "--bind", what, where], check=True, capture_output=True)
            stack.callback(subprocess.run, ["umount", where], check=True)
        yield


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as name:
        what, where = Path(name, "what"), Path(name, "where")
        what.mkdir()
        where.mkdir()
        try:
            with mounted((what, where)):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs root")


@needs_mount
@pytest.mark.parametrize(("strategy", "names"), [("commit", "kept"), ("pull", "lowest")])
def test_no_rename_leads_from_one_mount_to_another(
    tmp_path: Path, strategy: str, names: str
) -> None:
    """The same device, and yet rename says EXDEV: another way, or none."""
    for name in ("a", "b", "mount-a", "mount-b"):
        (tmp_path / name).mkdir()
    with mounted((tmp_path / "a", tmp_path / "mount-a"), (tmp_path / "b", tmp_path / "mount-b")):
        disk = chain_in(tmp_path / "mount-b")
        top = tmp_path / "mount-a" / "top.qcow2"
        (tmp_path / "b" / "top.qcow2").rename(tmp_path / "a" / "top.qcow2")
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", "../mount-b/mid.qcow2", "-F", "qcow2", top)
        before = state(tmp_path)
        gate = Gate(allow=(tmp_path,))
        options = MergeOptions(strategy=strategy, names=names)
        refusals = plan_of(top, ["mid.qcow2"], options, gate)
        assert len(refusals) == 1 and "another filesystem" in refusals[0], refusals
        assert state(tmp_path) == before
        with open_chain(top, gate) as chain:
            plan = make_plan(chain, Request(drop=("mid.qcow2",)))
            assert not plan.refusals
            execute(plan, chain)
        assert raw_of(top) == disk.points["top.qcow2"]


@needs_mount
def test_a_file_that_is_a_mount_point(tmp_path: Path) -> None:
    """It cannot be renamed nor removed (EBUSY)."""
    (tmp_path / "images").mkdir()
    disk = build(tmp_path / "images", LINES, ("base", "mid", "top"))
    mid = tmp_path / "images" / "mid.qcow2"
    mid.rename(tmp_path / "elsewhere")
    mid.touch()
    with mounted((tmp_path / "elsewhere", mid)):
        refusals = plan_of(disk.active, ["mid.qcow2"])
    assert len(refusals) == 1 and "mount point" in refusals[0], refusals


# --- the image above the kept one ----------------------------------------------------------


FOUR = ("base", "mid", "top", "above")
# Where the kept image's name goes, the header of what backs on it is written last of all.
RENAMING = [("commit", "lowest"), ("commit", "target"), ("pull", "lowest")]
HARMLESS = ("snapshot", "bitmap")


@pytest.mark.parametrize(("strategy", "names"), RENAMING)
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_the_image_above_must_be_fit_to_be_led_to_another_name(
    tmp_path: Path, defect: Defect, strategy: str, names: str
) -> None:
    disk = build(tmp_path, [*LINES, "64k:E"], FOUR)
    if defect.name in ("encrypted", "data file"):
        qemu_options = {
            "encrypted": ["--object", "secret,id=s,data=abc",
                          "-o", "encrypt.format=aes,encrypt.key-secret=s"],
            "data file": ["-o", f"data_file={tmp_path}/above.data"],
        }[defect.name]  # fmt: skip
        disk.active.unlink()
        qemu_img("create", "-q", "-f", "qcow2", *qemu_options, "-u", "-b", "top.qcow2",
                 "-F", "qcow2", disk.active, "384k")  # fmt: skip
    else:
        defect.spoil(disk.active)
    before = state(tmp_path)
    options = MergeOptions(strategy=strategy, names=names)
    refusals = plan_of(disk.active, ["mid.qcow2"], options)
    assert state(tmp_path) == before
    if defect.name in HARMLESS:
        disk.merge(["mid.qcow2"], options)
        assert raw_of(disk.active) == disk.points["above.qcow2"]
        return
    assert len(refusals) == 1, refusals
    assert defect.reason in refusals[0] and "above." in refusals[0]
    # Where names stay, nobody writes to it.
    assert plan_of(disk.active, ["mid.qcow2"], MergeOptions(strategy=strategy)) == ()


@pytest.mark.parametrize(("strategy", "names"), RENAMING)
def test_the_image_above_may_not_be_written(strategy: str, names: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "images"
        disk = build(directory, [*LINES, "64k:E"], FOUR)
        Path(temporary).chmod(0o755)
        directory.chmod(0o777)
        for path in disk.paths:
            path.chmod(0o444 if path == disk.active else 0o666)
        options = MergeOptions(strategy=strategy, names=names)
        lines = as_ordinary_user(lambda: plan_of(disk.active, ["mid.qcow2"], options))
    assert "above.qcow2" in lines and "cannot be written to" in lines


# --- names for which there is no room ------------------------------------------------------


@pytest.mark.parametrize("names", ["lowest", "target"])
@pytest.mark.parametrize("fits", [True, False])
def test_a_header_without_room_for_the_name(tmp_path: Path, names: str, fits: bool) -> None:
    """A header of 512 bytes: what the file is called in the end goes in, or it is refused."""
    # The longest name that qemu-img itself writes into such a header.
    image, longest = tmp_path / "probe.qcow2", 0
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-u", "-b", "x", "-F",
             "qcow2", image, "384k")  # fmt: skip
    while longest < 600:
        argv = ["rebase", "-u", "-f", "qcow2", "-b", "x" * (longest + 1), "-F", "qcow2", image]
        if subprocess.run(["qemu-img", *argv], capture_output=True, check=False).returncode:
            break
        longest += 1
    assert 300 < longest < 500 and len(qemu_info(image)["backing-filename"]) == longest
    image.unlink()
    deep = tmp_path / ("d" * 200) / ("e" * (longest - 201 - len("/mid.qcow2") + (not fits)))
    deep.mkdir(parents=True)
    disk = build(tmp_path, [*LINES, "[cluster=512] 64k:E"], FOUR)
    mid = deep / "mid.qcow2"
    disk.paths[1].rename(mid)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "../../base.qcow2", "-F", "qcow2", mid)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", mid.relative_to(tmp_path), "-F", "qcow2",
             disk.paths[2])  # fmt: skip
    before = state(tmp_path)
    gate = Gate(allow=(tmp_path,))
    options = MergeOptions(strategy="commit", names=names)
    refusals = plan_of(disk.active, [str(mid)], options, gate)
    if fits:
        assert not refusals
        with open_chain(disk.active, gate) as chain:
            execute(make_plan(chain, Request(drop=(str(mid),)), options), chain)
    else:
        assert len(refusals) == 1 and "no room" in refusals[0] and "above" in refusals[0]
        assert state(tmp_path) == before
    assert raw_of(disk.active) == disk.points["above.qcow2"]


# --- names under which --keep-files saves --------------------------------------------------


@pytest.mark.parametrize("strategy", ["commit", "both"])
def test_saved_twice(tmp_path: Path, strategy: str) -> None:
    disk = build(tmp_path, [*LINES, "64k:E"], FOUR)
    saved = tmp_path / "above.qcow2.qchain-old"
    saved.write_bytes(b"from last year")
    options = MergeOptions(strategy=strategy, keep_files=True)
    old = disk.active.read_bytes()
    disk.merge(["mid.qcow2", "top.qcow2"], options)
    assert raw_of(disk.active) == disk.points["above.qcow2"]
    assert saved.read_bytes() == b"from last year"
    assert (tmp_path / "above.qcow2.qchain-old.2").read_bytes() == old


def test_a_name_that_is_taken_at_the_last_moment(tmp_path: Path) -> None:
    """It fails before anything is led elsewhere, and all is put back."""
    disk = build(tmp_path, [*LINES, "64k:E"], FOUR)
    saved = tmp_path / "above.qcow2.qchain-old"

    def take(step: Step) -> None:
        if isinstance(step, HardLink) and step.link == saved:
            saved.write_bytes(b"mine")

    options = MergeOptions(strategy="both", keep_files=True)
    with pytest.raises(FailedMidway, match="merge again"):
        disk.merge(["mid.qcow2", "top.qcow2"], options, before_step=take)
    assert raw_of(disk.active) == disk.points["above.qcow2"]
    assert saved.read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {*disk.points, saved.name}


def test_the_saved_name_goes_when_the_merge_is_put_back(tmp_path: Path) -> None:
    disk = chain_in(tmp_path)

    def stop(step: Step) -> None:
        if isinstance(step, Rename):
            raise FailedMidway("test", "stops here")

    options = MergeOptions(strategy="commit", keep_files=True)
    with pytest.raises(FailedMidway, match="merge again"):
        disk.merge(["mid.qcow2"], options, before_step=stop)
    assert raw_of(disk.active) == disk.points["top.qcow2"]
    assert {path.name for path in tmp_path.iterdir()} == set(disk.points)


def test_a_saved_name_that_is_too_long(tmp_path: Path) -> None:
    disk = build(tmp_path, LINES, ("base", "mid", "x" * 240))
    before = state(tmp_path)
    options = MergeOptions(strategy="commit", keep_files=True)
    refusals = plan_of(disk.active, ["mid.qcow2"], options)
    assert len(refusals) == 1 and "too long" in refusals[0]
    assert state(tmp_path) == before
    disk.merge(["mid.qcow2"], MergeOptions(strategy="commit"))
