"""Between plan and merge the world may change: then nothing is done."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from merging import build

from fixtures.oracle import qemu_img, qemu_io
from qchain.chain.chain import open_chain
from qchain.chain.gate import Gate
from qchain.errors import Refused
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.run.execute import execute

LINES = ["64k:A 64k:B", "64k:C 64k:-", "64k:- 64k:D"]


@pytest.mark.parametrize("name", ["base.qcow2", "l1.qcow2", "l2.qcow2"])
def test_an_image_written_to_after_planning(tmp_path: Path, name: str) -> None:
    disk = build(tmp_path, LINES)
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=("l1.qcow2",)))
        qemu_io(tmp_path / name, ["write -q -P 7 64k 4k"], "qcow2")
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(Refused, match="changed since it was planned"):
            execute(plan, chain)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_image_replaced_after_planning(tmp_path: Path) -> None:
    disk = build(tmp_path, LINES)
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=("l1.qcow2",)))
        disk.paths[1].rename(tmp_path / "away")
        subprocess.run(["cp", "-a", tmp_path / "away", disk.paths[1]], check=True)
        with pytest.raises(Refused, match="changed since"):
            execute(plan, chain)


def test_a_backing_name_that_is_no_plain_name(tmp_path: Path) -> None:
    disk = build(tmp_path, LINES)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", f"file:{disk.paths[0]}", "-F", "qcow2",
             disk.paths[1])  # fmt: skip
    plan = disk.plan(Request(drop=("l1.qcow2",)))
    assert any("not a plain file name" in line for line in plan.refusals)


def test_a_backing_file_that_was_searched_for(tmp_path: Path) -> None:
    disk = build(tmp_path, LINES)
    away = tmp_path / "away"
    away.mkdir()
    disk.paths[0].rename(away / "base.qcow2")
    with open_chain(disk.active, Gate(search=(away,))) as chain:
        plan = make_plan(chain, Request(drop=("l1.qcow2",)))
    assert any("is not where it says" in line for line in plan.refusals)
