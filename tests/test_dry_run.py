"""The commands that a dry run prints, typed into a shell, do what the merge does.

The same plan twice: once as shell lines run by `sh -e`, once by `execute`, each on the
same chain; every file left has the same name and shows the same point.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from merging import Disk, build, format_of
from test_merge_names import HOSTILE, lay

from fixtures.oracle import qemu_check, raw_of
from qchain.chain.chain import open_chain
from qchain.chain.gate import Gate
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import arguments, shell_line
from qchain.run.execute import execute

NAMES = ("base", "a", "b", "top")
LINES = (
    "448k:A 64k:- 256k:A",
    "64k:B 64k:- 64k:B 64k:- 64k:0 64k:- 128k:B 128k:. 64k:b",
    "[cluster=16k size=832k] 128k:C 64k:- 64k:C 320k:- 16k:c",
    "[size=704k] 40k:D 216k:- 64k:D 256k:- 512:D",
)
RAW = ("[raw] 448k:A 64k:- 256k:A", *LINES[1:])

CASES = [
    (strategy, names, drop, lines)
    for strategy in ("pull", "commit", "both")
    for names in ("kept", "lowest", "target")
    for drop, lines in ((("a", "b"), RAW), (("base", "a", "b"), LINES))
] + [
    ("auto", "lowest", ("base", "b"), LINES),
    ("copy", "kept", ("a", "b"), RAW),
    ("copy", "lowest", ("a", "b"), LINES),
    ("copy", "kept", ("base", "a", "b"), LINES),
    ("commit", "lowest", ("base",), RAW),
    ("pull", "lowest", ("a",), RAW),
    ("commit", "kept", ("base", "a", "b"), RAW),
]


def shell(plan: Plan) -> None:
    """All lines of the plan, as one script."""
    script = "\n".join(line for step in plan.steps if (line := shell_line(step)) is not None)
    done = subprocess.run(
        ["sh", "-eu"], input=os.fsencode(script), capture_output=True, cwd="/", check=False
    )
    assert done.returncode == 0, (script, done.stderr)


def files(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Per name what it reads and its mode; checked by qemu-img."""
    found = {}
    for path in sorted(directory.iterdir()):
        fmt = format_of(path)
        found[path.name] = (raw_of(path, fmt), stat.S_IMODE(path.stat().st_mode))
        if fmt == "qcow2":
            assert qemu_check(path) == {"corruptions": 0, "leaks": 0}
    return found


@pytest.mark.parametrize(("strategy", "names", "drop", "lines"), CASES)
def test_the_lines_do_the_same(
    tmp_path: Path, strategy: str, names: str, drop: tuple[str, ...], lines: tuple[str, ...]
) -> None:
    disk = build(tmp_path / "images", lines, NAMES)
    disk.active.chmod(0o640)
    saved = shutil.copytree(disk.directory, tmp_path / "saved")
    options = MergeOptions(strategy=strategy, names=names, allow_format_change=True)
    request = Request(drop=tuple(p.name for p in disk.paths if p.stem in drop))

    plan = disk.plan(request, options)
    assert plan.steps, plan.refusals
    shell(plan)
    by_hand = files(disk.directory)
    after = disk.after(plan)
    assert {name: content for name, (content, _) in by_hand.items()} == {
        name: disk.points[point] for name, point in after.items()
    }

    shutil.rmtree(disk.directory)
    shutil.copytree(saved, disk.directory)
    merged, _ = disk.merge(request.drop, options)
    assert disk.after(merged) == after
    assert files(disk.directory) == by_hand


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("strategy", ["pull", "commit"])
def test_names_are_quoted(tmp_path: Path, name: str, strategy: str) -> None:
    paths = [tmp_path / f"{name}.{number}" for number in range(4)]
    lay(paths, [None, *(path.name for path in paths[:3])])
    expected = raw_of(paths[3])
    with open_chain(paths[3]) as chain:
        options = MergeOptions(strategy=strategy)
        plan = make_plan(chain, Request(drop=(str(paths[1]), str(paths[2]))), options)
    shell(plan)
    assert raw_of(paths[3]) == expected
    assert sorted(tmp_path.iterdir()) == sorted([paths[0], paths[3]])


def test_over_several_directories(tmp_path: Path) -> None:
    paths = [tmp_path / d / f"{d}.qcow2" for d in NAMES]
    lay(paths, [None, "../base/base.qcow2", "../a/a.qcow2", "../b/b.qcow2"])
    expected = raw_of(paths[3])
    with open_chain(paths[3], Gate(allow=(tmp_path,))) as chain:
        options = MergeOptions(strategy="both")
        plan = make_plan(chain, Request(drop=("a.qcow2", "b.qcow2")), options)
    shell(plan)
    assert raw_of(paths[3]) == expected
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == {paths[0], paths[3]}


def test_the_comparison_is_among_the_lines(tmp_path: Path) -> None:
    """Who runs them by hand is stopped before anything is deleted when the result is wrong."""
    disk = build(tmp_path / "images", LINES, NAMES)
    plan = disk.plan(Request(drop=("a.qcow2", "b.qcow2")), MergeOptions(strategy="commit"))
    lines = [line for step in plan.steps if (line := shell_line(step)) is not None]
    commit = next(n for n, line in enumerate(lines) if line.startswith("qemu-img commit"))
    lines[commit] = "true"
    done = subprocess.run(["sh", "-eu", "-c", "\n".join(lines)], capture_output=True, check=False)
    assert done.returncode != 0
    disk.expect({name: name for name in ("base.qcow2", "top.qcow2")}, complete=False)
    assert {path.name for path in disk.directory.iterdir()} >= {path.name for path in disk.paths}


def test_a_dry_run_changes_nothing_and_leaves_the_words_to_the_plan(tmp_path: Path) -> None:
    disk: Disk = build(tmp_path / "images", LINES, NAMES)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in disk.paths}
    plan = disk.plan(Request(flatten=True), MergeOptions(strategy="pull"))
    told = [words for step in plan.steps if (words := arguments(step, "/opt/q i")) is not None]
    assert {words[0] for words in told} <= {
        "/opt/q i", "mkdir", "rmdir", "ln", "sync", "rm", "mv", "cp"
    }  # fmt: skip
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in disk.paths} == before
    assert sorted(disk.directory.iterdir()) == sorted(disk.paths)


def test_the_work_directory_is_not_left_behind_by_the_last_line(tmp_path: Path) -> None:
    disk = build(tmp_path / "images", LINES, NAMES)
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(flatten=True), MergeOptions())
        execute(plan, chain)
    # Everything the plan made has been removed by it.
    assert not list(disk.directory.glob(".qchain*"))
