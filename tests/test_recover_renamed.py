"""What a person does by hand while a merge is stopped, and what a repeated commit would do."""

from __future__ import annotations

from pathlib import Path

import pytest
from merging import build
from stopping import LINES, stopped

from fixtures.oracle import qemu_img, raw_of
from qchain.errors import QchainError
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Request
from qchain.plan.steps import Compare, Step
from qchain.run.recover import journals_at, recover


def pulled(_number: int, step: Step) -> bool:
    """The header of what was pulled into names the alias by now."""
    return isinstance(step, Compare)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("names", ["kept", "lowest"])
def test_the_image_got_another_name(names: str, back: bool, tmp_path: Path) -> None:
    """An overlay took its name: the alias that it backs on must not go."""
    disk = build(tmp_path / "d", LINES)
    stopped(disk, ("base.qcow2", "l1.qcow2"), MergeOptions(strategy="pull", names=names), pulled)
    moved = disk.directory / "new.qcow2"
    disk.active.rename(moved)
    qemu_img("create", "-q", "-f", "qcow2", "-b", moved.name, "-F", "qcow2", disk.active)
    with pytest.raises(QchainError):
        recover(journals_at(disk.directory), back=back)
    assert raw_of(disk.active) == disk.points["l2.qcow2"]
    assert raw_of(moved) == disk.points["l2.qcow2"]
    assert journals_at(disk.directory)


def test_no_commit_into_lazy_refcounts(tmp_path: Path) -> None:
    """Stopped, it would leave them wrong; repeated, qemu-img says that they are right."""
    lines = ["[lazy size=256k] 256k:A", *LINES[1:]]
    disk = build(tmp_path / "d", lines)
    drop = Request(drop=("base.qcow2", "l1.qcow2"))
    refused = disk.plan(drop, MergeOptions(strategy="commit")).refusals
    assert len(refused) == 1 and "lazy refcounts" in refused[0]
    plan, result = disk.merge(request=drop)
    assert result.identical
    targets = {candidate.target: candidate.feasible for candidate in plan.groups[0].candidates}
    assert targets[2] is False and targets[1] is True
    disk.expect({"l2.qcow2": "l2.qcow2"})
