"""`qchain copy`: virsh's blockcopy, offline; the chain stays as it is."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest
from cli_runner import command, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging import Disk, build, format_of

from fixtures.generate import chains
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_check, qemu_info, raw_of
from qchain.chain.chain import open_chain
from qchain.run.copy import copy_point, planned_copy
from qchain.run.qemu_img import QemuImg

LINES = ["256k:A", "64k:- 64k:B 128k:-", "64k:C 128k:- 64k:0"]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    (tmp_path / "d").mkdir()
    return build(tmp_path / "d", LINES)


def untouched(disk: Disk) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in disk.directory.iterdir()}


def test_all_of_it(disk: Disk, tmp_path: Path) -> None:
    before = untouched(disk)
    done = run("copy", disk.active, tmp_path / "new.qcow2")
    assert done.code == 0, done.err
    assert "No point vanishes" in done.out
    assert raw_of(tmp_path / "new.qcow2") == disk.points[disk.active.name]
    assert "backing-filename" not in qemu_info(tmp_path / "new.qcow2")
    assert untouched(disk) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "new.qcow2"]


def test_under_a_link(disk: Disk, tmp_path: Path) -> None:
    """As the names of logical volumes are: whoever may read the file may read the copy."""
    disk.active.chmod(0o640)
    link = disk.directory / "link.qcow2"
    link.symlink_to(disk.active.name)
    done = run("copy", link, tmp_path / "new.qcow2")
    assert done.code == 0, done.err
    assert raw_of(tmp_path / "new.qcow2") == disk.points[disk.active.name]
    assert (tmp_path / "new.qcow2").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("number", [0, 1])
def test_over_a_base(disk: Disk, tmp_path: Path, number: int) -> None:
    """All layers above it, not only the uppermost, as a bare convert would have it."""
    base = disk.paths[number]
    done = run("copy", disk.active, tmp_path / "new.qcow2", "--base", base.name, "--json")
    assert done.code == 0, done.err
    name = f"d/{base.name}"
    assert done.json["backing"] == name and done.json["verified"]["identical"]
    info = qemu_info(tmp_path / "new.qcow2")
    assert (info["backing-filename"], info["backing-filename-format"]) == (name, "qcow2")
    assert raw_of(tmp_path / "new.qcow2") == disk.points[disk.active.name]


@settings(
    max_examples=40, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(layers=chains(min_layers=1, max_layers=4), pick=st.integers(-1, 3))
def test_any_chain(layers: list[LayerSpec], pick: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        disk = build(Path(temporary), layers)
        base = pick if 0 < pick < len(layers) else None
        out = disk.directory / "new"
        with open_chain(disk.active) as chain:
            copy_point(planned_copy(chain, out, base))
        assert format_of(out) == format_of(disk.active)
        assert raw_of(out, format_of(out)) == disk.points[disk.active.name]
        if format_of(out) == "qcow2":
            assert qemu_check(out) == {"corruptions": 0, "leaks": 0}
            mine, theirs = qemu_info(out), qemu_info(disk.active)
            assert mine["cluster-size"] == theirs["cluster-size"]
            for feature in ("compat", "extended-l2", "compression-type", "refcount-bits"):
                said = [each["format-specific"]["data"].get(feature) for each in (mine, theirs)]
                assert said[0] == said[1], feature


def test_the_commands_typed_by_hand_do_the_same(disk: Disk, tmp_path: Path) -> None:
    new = tmp_path / "new.qcow2"
    shown = run("copy", disk.active, new, "--base", disk.paths[0].name, "--dry-run")
    assert shown.code == 0 and not new.exists()
    for line in shown.out.splitlines():
        subprocess.run(shlex.split(line), check=True, capture_output=True)
    assert raw_of(new) == disk.points[disk.active.name]
    assert qemu_info(new)["backing-filename"] == f"d/{disk.paths[0].name}"


def test_who_may_read_it(disk: Disk, tmp_path: Path) -> None:
    disk.active.chmod(0o640)
    run("copy", disk.active, tmp_path / "new.qcow2")
    assert (tmp_path / "new.qcow2").stat().st_mode & 0o777 == 0o640


def test_refused(disk: Disk, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert "exists already" in run("copy", disk.active, taken).fails(3)
    assert taken.read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "exists already" in run("copy", disk.active, tmp_path / "link").fails(3)
    assert "does not exist" in run("copy", disk.active, tmp_path / "no" / "x").fails(2)
    assert "not in the chain" in run("copy", disk.active, tmp_path / "x", "--base", "y").fails(2)
    own = run("copy", disk.active, tmp_path / "x", "--base", disk.active.name)
    assert "its own base" in own.fails(2)
    assert not (tmp_path / "x").exists()


def test_in_use(disk: Disk, tmp_path: Path) -> None:
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", disk.active], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as guest:
        assert guest.stdin is not None and guest.stdout is not None
        guest.stdin.write(b"write 0 512\n")
        guest.stdin.flush()
        guest.stdout.readline()
        assert "in use" in run("copy", disk.active, tmp_path / "x").fails(3)
        guest.stdin.close()
    assert not (tmp_path / "x").exists()


LIES = {
    "does nothing": 'touch "$last"',
    "fails": "exit 1",
    "half": '{real} "$@" && {real} --version >/dev/null && '
    "printf x | dd of=$last bs=1 seek=327680 conv=notrunc status=none",
}


@pytest.mark.parametrize("lie", LIES)
def test_an_exit_code_is_no_evidence(disk: Disk, tmp_path: Path, lie: str) -> None:
    program = tmp_path / "qemu-img"
    body = LIES[lie].replace("{real}", "/usr/bin/qemu-img")
    program.write_text(f'#!/bin/bash\nlast="${{@: -1}}"\n{body}\n')
    program.chmod(0o755)
    before = untouched(disk)
    done = command("copy", disk.active, tmp_path / "x", QCHAIN_QEMU_IMG=str(program))
    assert "nothing is left of the copy" in done.fails(5)
    assert untouched(disk) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "qemu-img"]


def test_a_name_that_came_to_be_meanwhile(disk: Disk, tmp_path: Path) -> None:
    """It is nobody's to be replaced."""
    new = tmp_path / "new.qcow2"

    class Slow(QemuImg):
        def run(self, *args: object, **more: object) -> None:
            super().run(*args, **more)  # type: ignore[arg-type]
            new.write_text("mine")

    with open_chain(disk.active) as chain:
        wanted = planned_copy(chain, new, None)
        with pytest.raises(Exception, match="exists"):
            copy_point(wanted, Slow())
    assert new.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "new.qcow2"]
