"""The peak of a merge on each filesystem, and what it frees: against what the files really take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from merging import Disk, build

from qchain.chain.chain import open_chain
from qchain.chain.chain_tree import tree_of
from qchain.plan.candidates import candidates_of, figures_of
from qchain.plan.growth import Growth
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan
from qchain.plan.refusals import space_refusals
from qchain.plan.selection import Group, Request
from qchain.plan.space import Change, changes_of, device_shortage, freed_by, peaks
from qchain.plan.steps import Step

A, B = 1, 2


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ([], {}),
        ([(A, 5)], {A: 5}),
        ([(A, 5), (A, -5), (A, 7)], {A: 7}),
        ([(A, 5), (A, -9), (A, 7)], {A: 5}),
        ([(A, 5), (A, -1), (A, 7)], {A: 11}),
        ([(A, 5), (B, 3), (A, -5), (B, 4)], {A: 5, B: 7}),
        ([(A, -5), (A, 4)], {A: 0}),
        ([(A, -5), (A, 9)], {A: 4}),
    ],
)
def test_peaks(changes: list[tuple[int, int]], wanted: dict[int, int]) -> None:
    assert peaks(Change(*change) for change in changes) == wanted


def taken(directory: Path) -> int:
    """Bytes that all files below take, each once."""
    files = {p.lstat().st_ino: p.lstat().st_blocks * 512 for p in directory.rglob("*") if _is(p)}
    return sum(files.values())


def _is(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


class Watch:
    """The most that a directory took before any step of a merge, and when files went."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.before = self.most = taken(directory)

    def __call__(self, _step: Step) -> None:
        self.most = max(self.most, taken(self.directory))

    @property
    def extra(self) -> int:
        return self.most - self.before


def planned_peak(plan: Plan, keep_files: bool = False) -> int:
    changes: list[Change] = []
    for group in plan.groups:
        assert group.chosen is not None
        target, growth = group.chosen.target, group.chosen.growth
        assert target is not None and growth is not None
        changes += changes_of(plan.layers, group.group, target, growth, keep_files)
    (peak,) = peaks(changes).values()
    return peak


LINES = {
    "small": ["[size=8M] 1M:A", "64k:- 3M:B", "128k:- 4M:C"],
    "compressed": ["[size=8M] 4M:a", "64k:B", "256k:- 64k:C 512k:- 64k:C"],
    "preallocated": ["[size=8M prealloc=metadata]", "1M:B", "2M:- 1M:C"],
    "raw": ["[raw size=8M] 1M:A", "4M:- 1M:B", "6M:- 64k:C"],
    "two": ["[size=8M] 1M:A", "2M:- 1M:B", "4M:- 1M:C", "64k:D", "6M:- 1M:E"],
}
SLACK = 1 << 20
"""Aliases are shorter than planned, and qemu-img leaves out what is zero as holes."""

MERGES = [
    ("small", "pull", ["l1"]), ("small", "commit", ["l1"]), ("small", "both", ["base", "l1"]),
    ("small", "commit", ["base", "l1"]), ("compressed", "pull", ["l1"]),
    ("compressed", "commit", ["base", "l1"]), ("preallocated", "commit", ["base", "l1"]),
    ("preallocated", "pull", ["l1"]), ("raw", "commit", ["base", "l1"]), ("raw", "pull", ["l1"]),
    ("two", "pull", ["l1", "l3"]), ("two", "commit", ["l1", "l3"]),
    ("two", "both", ["base", "l1", "l2", "l3"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "strategy", "drop"), MERGES)
def test_the_peak_is_what_the_files_take(
    name: str, strategy: str, drop: list[str], tmp_path: Path
) -> None:
    disk = build(tmp_path, LINES[name])
    dropped = [path.name for path in disk.paths if path.stem in drop]
    options = MergeOptions(strategy=strategy, allow_format_change=True)
    watch = Watch(tmp_path)
    plan, _ = disk.merge(dropped, options, before_step=watch)
    peak = planned_peak(plan)
    assert watch.extra <= peak + 65536, "the journal alone is not planned"
    assert peak <= watch.extra + SLACK
    expect_freed(disk, plan, watch)


def expect_freed(disk: Disk, plan: Plan, watch: Watch) -> None:
    """Afterwards there is what was, less what was freed, and what was needed at most."""
    freed = sum(g.chosen.freed_bytes for g in plan.groups if g.chosen is not None)
    grown = [g.chosen.peak_extra_bytes for g in plan.groups if g.chosen is not None]
    now = taken(disk.directory)
    assert watch.before - freed - SLACK <= now <= watch.before - freed + sum(grown) + SLACK


@pytest.mark.parametrize("keep", [False, True])
def test_freed_bytes_are_those_of_the_files_that_go(tmp_path: Path, keep: bool) -> None:
    disk = build(tmp_path, LINES["small"])
    sizes = {path.name: path.stat().st_blocks * 512 for path in disk.paths}
    request = Request(drop=("l1.qcow2",))
    plan = disk.plan(request, MergeOptions(keep_files=keep))
    for candidate in plan.groups[0].candidates:
        if candidate.strategy == "pull":
            assert candidate.freed_bytes == (0 if keep else sizes["l1.qcow2"])
        if candidate.strategy == "commit":
            assert candidate.freed_bytes == (0 if keep else sizes["l2.qcow2"])


def test_what_a_group_frees_serves_the_next(tmp_path: Path) -> None:
    disk = build(tmp_path, LINES["two"])
    options = MergeOptions(strategy="pull")
    plan = disk.plan(Request(drop=("l1.qcow2", "l3.qcow2")), options)
    alone = [g.chosen.peak_extra_bytes for g in plan.groups if g.chosen is not None]
    assert alone[0] <= planned_peak(plan) < sum(alone)
    assert planned_peak(plan, keep_files=True) > planned_peak(plan)


def test_two_filesystems_are_two_sums(tmp_path: Path) -> None:
    """Of a chain over several filesystems each gives what its own files take."""
    disk = build(tmp_path, LINES["small"])
    with open_chain(disk.active) as chain:
        group = Group((0, 1, 2), 2, 2)
        figures = figures_of(chain.layers, group)
        candidates = candidates_of(tree_of(chain), group, figures, MergeOptions())
        here = chain.layers[1].file.id.device
        chain.layers[1].file.id = replace(chain.layers[1].file.id, device=here + 1)
        growth = candidates[0].growth
        assert growth is not None
        changes = changes_of(chain.layers, group, 0, growth, keep_files=False)
        assert peaks(changes) == {here: candidates[0].peak_extra_bytes, here + 1: 0}
        assert sum(c.amount for c in changes if c.device == here) == growth.file + holes(disk)
        freed = -sum(c.amount for c in changes if c.device == here + 1)
        assert freed == freed_by(chain.layers, group, 0) == chain.layers[1].file.disk_size


def holes(disk: Disk) -> int:
    status = disk.active.stat()
    return max(0, status.st_size - status.st_blocks * 512)


def test_the_refusal_names_the_filesystem_without_room(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    assert space_refusals({device: 1}, [tmp_path, tmp_path]) == []
    (line,) = space_refusals({device: 1 << 60, device + 1: 1 << 61}, [tmp_path, tmp_path])
    assert str(1 << 60) in line and line.startswith(f"{tmp_path}: ")


@pytest.mark.parametrize(("end", "fits"), [(65536, True), (65537, False)])
def test_a_block_device_must_hold_the_result(tmp_path: Path, end: int, fits: bool) -> None:
    disk = build(tmp_path, ["[raw size=64k] 4k:A", "4k:B"])
    growth = Growth(1, 1, end, end, 0)
    with open_chain(disk.active) as chain:
        layer = chain.layers[1]
        assert device_shortage(layer, growth) is None  # a file grows
        layer.file.is_block_device = True
        told = device_shortage(layer, growth)
        assert told is None if fits else told is not None and "block device of 65536" in told
