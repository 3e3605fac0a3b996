"""The native engine where extents can be shared: XFS in a file, mounted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from merging import Disk, build

from fixtures.language import parse_layer
from qchain.chain.chain import open_chain
from qchain.errors import FailedMidway
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Compare, Step
from qchain.run.execute import execute

LINES = ["8M:A", "1M:- 4M:B 3M:-", "2M:- 64k:C 6080k:-"]


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    image, place = tmp_path / "xfs", tmp_path / "mnt"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def _built(place: Path) -> Disk:
    disk = build(place, [parse_layer(line) for line in LINES])
    os.sync()
    return disk


@pytest.mark.parametrize("strategy", ["pull", "commit", "copy"])
def test_nothing_moves(xfs: Path, strategy: str) -> None:
    """Neither space is taken nor data read; qemu-img reads what it must read all the same."""
    disk = _built(xfs)
    free = os.statvfs(xfs).f_bfree
    options = MergeOptions(strategy=strategy, engine="native", keep_files=True)
    taken = []

    def look(step: Step) -> None:
        if isinstance(step, Compare):
            os.sync()
            status = os.statvfs(xfs)
            taken.append((free - status.f_bfree) * status.f_frsize)

    drop = disk.paths[1].name
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=(drop,)), options)
        assert not plan.refusals, plan.refusals
        result = execute(plan, chain, before_step=look)
    assert result.identical and result.compared_bytes == 0
    assert taken[0] < 1 << 20, taken
    final = next(group.result for group in plan.groups)
    assert final is not None
    shown = {disk.paths[0].name: disk.paths[0].name, final.name: disk.active.name}
    disk.expect(shown, complete=False)


@pytest.mark.parametrize("strategy", ["pull", "copy"])
def test_what_is_not_shared_is_read(xfs: Path, strategy: str) -> None:
    """One byte that changed in between is no longer shared, and is found."""
    disk = _built(xfs)
    options = MergeOptions(strategy=strategy, engine="native")
    sizes = {path: path.stat().st_size for path in disk.paths}

    times: dict[Path, int] = {}

    def spoil(step: Step) -> None:
        if isinstance(step, Compare):
            # As a disk would: no time tells.
            times[step.new] = step.new.stat().st_mtime_ns
            with step.new.open("r+b") as file:
                # In the middle of what has come in.
                file.seek(sizes.get(step.new, 1 << 20) + (1 << 20))
                file.write(b"?")
                os.fsync(file.fileno())
            os.utime(step.new, ns=(times[step.new], times[step.new]))

    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=(disk.paths[1].name,)), options)
        assert not plan.refusals, plan.refusals
        with pytest.raises(FailedMidway, match="differs at guest offset"):
            execute(plan, chain, before_step=spoil)
    disk.expect({path.name: path.name for path in disk.paths})
