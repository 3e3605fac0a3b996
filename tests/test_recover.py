"""Killed before any step, a merge is finished or put back by `recover`; no kept point is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from merging import Disk, build
from stopping import killed

from fixtures.oracle import raw_of
from qchain.chain.chain import open_chain
from qchain.errors import Refused
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Request
from qchain.run.recover import journals_at, recover

LINES = [
    "[cluster=64k] 64k:A 64k:B 64k:- 64k:C 256k:-",
    "[cluster=64k] 64k:- 64k:D 64k:0 320k:-",
    "[cluster=128k size=640k] 128k:e 128k:- 128k:F 128k:g",
    "[cluster=4k size=512k] 128k:- 64k:G 192k:- 4k:H",
]
CASES = [
    (("l1.qcow2", "l2.qcow2"), "pull", "kept"),
    (("l1.qcow2", "l2.qcow2"), "commit", "kept"),
    (("l1.qcow2", "l2.qcow2"), "both", "kept"),
    (("l1.qcow2", "l2.qcow2"), "both", "lowest"),
    (("base.qcow2", "l2.qcow2"), "auto", "kept"),
    (("base.qcow2", "l2.qcow2"), "pull", "lowest"),
    (("base.qcow2", "l1.qcow2", "l2.qcow2"), "pull", "kept"),
    (("l1.qcow2", "l2.qcow2"), "commit", "target"),
    (("l1.qcow2", "l2.qcow2"), "copy", "kept"),
    (("base.qcow2", "l2.qcow2"), "copy", "lowest"),
]


def killed_before(disk: Disk, drop: tuple[str, ...], options: MergeOptions, number: int) -> Plan:
    """Merge in a child that kills itself before step `number`; the plan it followed."""
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=drop), options)
        assert not plan.refusals
        killed(plan, chain, lambda at, _step: at == number)
    return plan


def kept_read_right(disk: Disk, plan: Plan) -> None:
    """Each kept point reads right under its own name, or already under its new one."""
    for group in plan.groups:
        name = plan.layers[group.group.kept].path
        assert group.result is not None
        path = name if name.exists() else group.result
        assert raw_of(path) == disk.points[name.name], path


@pytest.mark.parametrize(("drop", "strategy", "names"), CASES)
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_killed_before_every_step(
    tmp_path: Path, drop: tuple[str, ...], strategy: str, names: str, back: bool
) -> None:
    options = MergeOptions(strategy=strategy, names=names)
    count = None
    number = CASES.index((drop, strategy, names)) % 2
    stride = 1 if "QCHAIN_TORTURE" in os.environ else 5 if back else 3
    while count is None or number < count:
        directory = tmp_path / str(number)
        directory.mkdir()
        disk = build(directory, LINES)
        plan = killed_before(disk, drop, options, number)
        count = len(plan.steps)
        kept_read_right(disk, plan)
        with open_chain(disk.active if disk.active.exists() else plan.groups[0].result) as chain:
            again = make_plan(chain, Request(flatten=True), options)
        assert any("not finished" in line for line in again.refusals)
        journals = journals_at(directory)
        assert len(journals) == 1
        if back:
            try:
                (done,) = recover(journals, back=True, give_up_dropped=True)
                assert done.outcome == "put back"
                kept_read_right(disk, plan)
                if len(plan.groups) == 1:
                    # A commit has changed dropped images; the kept point is as it was.
                    assert {p.name for p in directory.iterdir()} == {p.name for p in disk.paths}
                    disk.merge(drop, options)
            except Refused:
                recover(journals)
        else:
            assert recover(journals)[0].outcome == "finished"
        if not back or len(plan.groups) == 1:
            disk.expect(disk.after(plan))
        assert not journals_at(directory)
        assert recover(journals_at(directory)) == []
        number += stride
