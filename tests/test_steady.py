"""A file that somebody else touches while it is merged stops the merge, at the next step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from merging import build

from qchain.errors import FailedMidway
from qchain.plan.options import MergeOptions
from qchain.plan.steps import Compare, Rename, Step, Sync

LINES = ["256k:A", "64k:- 64k:B 128k:-", "64k:C 192k:-"]
NAMES = ("base", "mid", "top")


def touched(path: Path) -> None:
    """Written to, by something that asks for no lock: the length stays."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(last)


def longer(path: Path) -> None:
    times = path.stat()
    with path.open("ab") as file:
        file.write(bytes(512))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replaced(path: Path) -> None:
    """A restore from a backup: the same bytes, the same times, another file."""
    shutil.copy2(path, f"{path}.other")
    Path(f"{path}.other").replace(path)


@pytest.mark.parametrize("change", [touched, longer, replaced])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", ["pull", "commit"])
@pytest.mark.parametrize("before", [Sync, Compare])
def test_a_file_that_changes_while_it_is_merged(
    tmp_path: Path,
    before: type[Step],
    strategy: str,
    name: str,
    change: Callable[[Path], None],
) -> None:
    disk = build(tmp_path, LINES, NAMES)
    path = tmp_path / f"{name}.qcow2"
    done: list[Step] = []

    def watch(step: Step) -> None:
        assert not (done and isinstance(step, Rename)), "it went on"
        if isinstance(step, before) and not done:
            done.append(step)
            change(path)

    why = "has become another file" if change is replaced else "another program has written to it"
    with pytest.raises(FailedMidway, match=why) as caught:
        disk.merge(["mid.qcow2"], MergeOptions(strategy=strategy), before_step=watch)
    assert str(caught.value.what) == str(path)
    assert done
    kept = {"top.qcow2": "top.qcow2", "base.qcow2": "base.qcow2"}
    disk.expect(kept, complete=False)
    pulled = before is Compare and name == "mid"
    if strategy == "pull" and change is replaced and (name == "top" or pulled):
        # The file that was being pulled into is gone, perhaps to another name, or what its header
        # would be led back to is: its aliases stay.
        assert "'qchain recover' continues" in str(caught.value)
        return
    assert {each.name for each in tmp_path.iterdir()} == set(disk.points)
    disk.merge(["mid.qcow2"], MergeOptions(strategy=strategy))
    disk.expect(kept)
