"""Others that read from what a merge changes, however they say so: found, or it is refused."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from merging import Disk, build
from test_merge_refusals import (
    LINES,
    MERGES,
    as_ordinary_user,
    chain_in,
    command,
    plan_of,
    state,
)

from fixtures.oracle import qemu_img, qemu_io, raw_of
from qchain.chain.chain import open_chain
from qchain.chain.scan import overlays_in
from qchain.errors import ExitCode, FailedMidway, Refused
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Command, Rename, Step, Unlink
from qchain.run.execute import execute
from qchain.run.recover import journals_at, recover

STRATEGIES = ("pull", "commit")


def json_name(**options: object) -> str:
    return "json:" + json.dumps(options)


def made(fmt: str, backing: str, path: Path) -> None:
    """An overlay that qemu-img makes, of mid.qcow2 under whatever name."""
    qemu_img("create", "-q", "-f", fmt, "-b", backing, "-F", "qcow2", path)
    qemu_io(path, ["write -q -P 7 0 64k"], fmt)


WAYS: dict[str, Callable[[Path], tuple[str, str]]] = {
    "json with an option of the format": lambda mid: ("qcow2", json_name(
        driver="qcow2", discard="unmap", file={"driver": "file", "filename": str(mid)})),
    "json with a node name": lambda mid: ("qcow2", json_name(
        driver="qcow2", **{"node-name": "x", "file.driver": "file", "file.filename": str(mid)})),
    "json behind a filter": lambda mid: ("qcow2", json_name(
        driver="qcow2",
        file={"driver": "blkdebug", "image": {"driver": "file", "filename": str(mid)}})),
    "json, relative": lambda mid: ("qcow2", json_name(
        driver="qcow2", file={"driver": "file", "filename": mid.name})),
    "file:": lambda mid: ("qcow2", f"file:{mid}"),
    "file:, relative": lambda mid: ("qcow2", f"file:{mid.name}"),
    "blkdebug:": lambda mid: ("qcow2", f"blkdebug::{mid}"),
    "QED": lambda mid: ("qed", mid.name),
    "QED, absolute": lambda mid: ("qed", str(mid)),
    "qcow version 1": lambda mid: ("qcow", mid.name),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_name_a_backing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.chdir(tmp_path)  # from where qemu takes some relative names
    disk = chain_in(tmp_path)
    other = tmp_path / "other"
    fmt, backing = WAYS[way](tmp_path / "mid.qcow2")
    made(fmt, backing, other)
    before = state(tmp_path)
    for strategy in STRATEGIES:
        refusals = plan_of(disk.active, ["mid.qcow2"], MergeOptions(strategy=strategy))
        assert len(refusals) == 1, refusals
        assert refusals[0].startswith(f"{other}: ") and "mid.qcow2" in refusals[0]
    assert command(disk.active, ["mid.qcow2"]) == ExitCode.REFUSED
    assert state(tmp_path) == before
    # What backs on the base, which stays, is welcome.
    fmt, backing = WAYS[way](tmp_path / "base.qcow2")
    other.unlink()
    made(fmt, backing, other)
    assert plan_of(disk.active, ["mid.qcow2"]) == ()


@pytest.mark.parametrize(
    "backing",
    ["http://host/mid.qcow2", "nbd:host:10809:exportname=mid.qcow2", "nbd+unix:///mid.qcow2",
     json_name(driver="qcow2", file={"driver": "https", "url": "https://host/mid.qcow2"}),
     "json:{", "elsewhere/mid.qcow2"],
)  # fmt: skip
def test_names_that_lead_to_other_hosts_or_nowhere(tmp_path: Path, backing: str) -> None:
    disk = chain_in(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "x", "-F", "qcow2", tmp_path / "o", "1M")
    data = bytearray((tmp_path / "o").read_bytes())
    at = int.from_bytes(data[8:16], "big")
    name = backing.encode()
    data[16:20] = len(name).to_bytes(4, "big")
    data[at : at + len(name)] = name
    (tmp_path / "o").write_bytes(data)
    assert plan_of(disk.active, ["mid.qcow2"]) == ()


@pytest.mark.parametrize("kind", ["qcow2", "vmdk"])
def test_a_base_that_is_another_images_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """An external data file, or the extent of a VMDK descriptor."""
    monkeypatch.chdir(tmp_path)
    disk = build(tmp_path, ["[raw] 256k:A 128k:-", *LINES[1:]], ("base", "mid", "top"))
    base = disk.paths[0]
    if kind == "qcow2":
        other = tmp_path / "other.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/d,data_file_raw=on",
                 other, "384k")  # fmt: skip
        qemu_img("amend", "-f", "qcow2", "-o", f"data_file={base.name}", other)
        (tmp_path / "d").unlink()
    else:
        other = tmp_path / "other.vmdk"
        qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", other, "384k")
        flat = tmp_path / "other-flat.vmdk"
        text = other.read_text()
        assert f'"{flat.name}"' in text
        other.write_text(text.replace(flat.name, base.name))
        flat.unlink()
    old = raw_of(other, kind)
    before = state(tmp_path)
    for names in ("lowest", "kept"):
        options = MergeOptions(strategy="commit", names=names, allow_format_change=True)
        refusals = plan_of(disk.active, [base.name, "mid.qcow2"], options)
        assert any("other." in line and base.name in line for line in refusals), refusals
    assert plan_of(disk.active, ["mid.qcow2"], MergeOptions(strategy="pull")) == ()
    assert state(tmp_path) == before
    assert raw_of(other, kind) == old


def test_a_header_that_only_others_can_read(tmp_path: Path) -> None:
    """A version that is to come: the backing name is where it always was."""
    disk = chain_in(tmp_path)
    other = tmp_path / "other.qcow2"
    made("qcow2", "mid.qcow2", other)
    with other.open("r+b") as file:
        file.seek(4)
        file.write((4).to_bytes(4, "big"))
    refusals = plan_of(disk.active, ["mid.qcow2"])
    assert len(refusals) == 1 and "other.qcow2: backs on mid.qcow2" in refusals[0]


@pytest.mark.parametrize("where", ["images", "scanned"])
def test_an_overlay_that_may_not_be_read(where: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "images"
        other = Path(temporary) / where / "other.qcow2"
        disk = chain_in(directory)
        other.parent.mkdir(exist_ok=True)
        made("qcow2", str(directory / "mid.qcow2"), other)
        (directory / "lock").write_text("")
        (directory / "pid").write_text("17\n")
        for path in (Path(temporary), *Path(temporary).rglob("*")):
            if os.getuid() == 0:
                os.chown(path, 65534, 65534)
        for path in (other, directory / "lock", directory / "pid"):
            path.chmod(0o000)
            if os.getuid() == 0:
                os.chown(path, 0, 0)
        options = MergeOptions(scan=(other.parent,))
        lines = as_ordinary_user(lambda: plan_of(disk.active, ["mid.qcow2"], options))
        assert lines.count("\n") == 0 and lines.startswith(f"{other}: permission denied"), lines
        assert "run as its owner, or move it" in lines
        other.chmod(0o644)
        assert "backs on mid.qcow2" in as_ordinary_user(
            lambda: plan_of(disk.active, ["mid.qcow2"], options)
        )
        other.unlink()
        assert as_ordinary_user(lambda: plan_of(disk.active, ["mid.qcow2"], options)) == ""
        other.parent.chmod(0o300)
        lines = as_ordinary_user(lambda: plan_of(disk.active, ["mid.qcow2"], options))
        assert f"{other.parent}: cannot be listed" in lines, lines
        other.parent.chmod(0o755)


def test_a_directory_full_of_other_files(tmp_path: Path) -> None:
    """One small read each: no file is read to its end, none is told of."""
    for number in range(3000):
        with (tmp_path / f"{number}.log").open("wb") as file:
            file.truncate(1 << 30)
    begun = time.process_time()
    assert list(overlays_in([tmp_path])) == []
    assert time.process_time() - begun < 3


# --- an overlay that comes later -----------------------------------------------------------


def come(disk: Disk) -> Path:
    """Somebody makes an overlay of mid.qcow2, while it still reads as it should."""
    other = disk.directory / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "mid.qcow2", "-F", "qcow2", other, "384k")
    return other


@pytest.mark.parametrize(("strategy", "names"), MERGES)
def test_an_overlay_made_after_the_plan(tmp_path: Path, strategy: str, names: str) -> None:
    """While a person thinks at the prompt."""
    disk = chain_in(tmp_path)
    with open_chain(disk.active) as chain:
        options = MergeOptions(strategy=strategy, names=names)
        plan = make_plan(chain, Request(drop=("mid.qcow2",)), options)
        other = come(disk)
        before = state(tmp_path)
        with pytest.raises(Refused, match=r"other\.qcow2: backs on mid\.qcow2"):
            execute(plan, chain)
    assert state(tmp_path) == before
    assert raw_of(other) == disk.points["mid.qcow2"]


WHEN = [
    (strategy, names, kind)
    for strategy, names in MERGES
    for kind in ("Freeze", "writing", "Compare", "switch", "Unlink")
    if (strategy, names, kind) not in (("commit", "kept", "Unlink"), ("commit", "lowest", "switch"))
]


@pytest.mark.parametrize(("strategy", "names", "kind"), WHEN)
def test_an_overlay_made_while_it_works(
    tmp_path: Path, strategy: str, names: str, kind: str
) -> None:
    """Nothing that it reads is deleted; and before the switch all is put back."""
    disk = chain_in(tmp_path)
    made_now: list[Path] = []

    def watch(step: Step) -> None:
        name = type(step).__name__
        if isinstance(step, Command):
            name = "switch" if "-u" in step.argv else "writing"
        elif isinstance(step, Rename):
            name = "switch"
        elif isinstance(step, Unlink) and ".qchain" in str(step.path):
            name = "work file"
        if not made_now and name == kind:
            made_now.append(come(disk))

    options = MergeOptions(strategy=strategy, names=names)
    with pytest.raises(FailedMidway) as caught:
        disk.merge(["mid.qcow2"], options, before_step=watch)
    assert "other.qcow2: backs on mid.qcow2" in str(caught.value)
    # What it backs on is there; a pull has not written to it, a commit has.
    assert (tmp_path / "mid.qcow2").exists()
    if strategy == "pull":
        assert raw_of(made_now[0]) == disk.points["mid.qcow2"]
    # Where there is no way back any more, all waits for the overlay to go.
    switched = "'qchain recover' continues" in str(caught.value)
    assert not switched or (strategy, kind) == ("pull", "Unlink")
    if not switched:
        disk.expect({"top.qcow2": "top.qcow2", "base.qcow2": "base.qcow2"}, complete=False)
        names_left = {path.name for path in tmp_path.iterdir()}
        assert names_left == {*disk.points, "other.qcow2"}
    made_now[0].unlink()
    if switched:
        recover(journals_at(tmp_path))
    else:
        disk.merge(["mid.qcow2"], options)
    result = "top.qcow2" if names == "kept" else "mid.qcow2"
    disk.expect({result: "top.qcow2", "base.qcow2": "base.qcow2"})
