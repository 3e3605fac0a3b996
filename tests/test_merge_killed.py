"""Killed anywhere, within qchain or within qemu-img: no kept point is lost.

The judge opens each kept point by its own name with the real qemu-img. Only where the names
policy gives a point another name may it be found there instead, once the old name is gone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from merging import Disk, build, format_of

from fixtures.oracle import qemu_check, qemu_img
from qchain.chain.chain import open_chain
from qchain.errors import Refused
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Step
from qchain.run.execute import execute
from qchain.run.qemu_img import QemuImg
from qchain.run.recover import journals_at, recover

NAMES = ("base", "a", "b", "top")
LINES = (
    "[cluster=32k] 448k:A 64k:- 256k:A",
    "64k:B 64k:- 64k:B 64k:- 64k:0 64k:- 128k:B 128k:. 64k:b",
    "[cluster=16k size=832k] 128k:C 64k:- 64k:C 320k:- 16k:c 16k:~",
    "[size=704k] 40k:D 216k:- 64k:D 256k:- 512:D",
)
RAW = ("[raw] 448k:A 64k:- 256k:A", *LINES[1:])


@dataclass(frozen=True)
class Merge:
    strategy: str
    names: str
    drop: tuple[str, ...]
    lines: tuple[str, ...] = LINES

    def __str__(self) -> str:
        base = "-raw" if self.lines is RAW else ""
        return f"{self.strategy}-{self.names}-{''.join(self.drop)}{base}"

    def dropped(self, disk: Disk) -> tuple[str, ...]:
        return tuple(path.name for path in disk.paths if path.stem in self.drop)

    def wanted(self) -> MergeOptions:
        return MergeOptions(strategy=self.strategy, names=self.names, allow_format_change=True)


MERGES = [
    Merge("pull", "kept", ("a", "b")),
    Merge("pull", "kept", ("base", "a", "b")),
    Merge("commit", "kept", ("a", "b")),
    Merge("both", "kept", ("a", "b"), RAW),
    Merge("both", "lowest", ("base", "a", "b")),
    # Here top is not merged, and its header must be led to another name.
    Merge("pull", "lowest", ("a",)),
    Merge("commit", "lowest", ("a",), RAW),
    Merge("commit", "lowest", ("base",), RAW),
    Merge("both", "target", ("base", "a")),
    # Two groups.
    Merge("auto", "lowest", ("base", "b")),
    Merge("commit", "kept", ("base", "b")),
    # The active image takes the name and the format of a raw base.
    Merge("commit", "kept", ("base", "a", "b"), RAW),
    Merge("commit", "target", ("base", "a", "b"), RAW),
]


def content(path: Path, scratch: Path) -> bytes:
    """As `raw_of`, but in spite of locks: qchain is still there in some tests."""
    raw = scratch / "judged.raw"
    fmt = format_of(path)
    qemu_img("convert", "-U", "-f", fmt, "-O", "raw", path, raw)
    return raw.read_bytes()


def judge(disk: Disk, plan: Plan, scratch: Path, when: str) -> None:
    """Every kept point, those below and above the groups included, reads as before."""
    names = {layer.path.name: layer.path for layer in plan.layers}
    for group in plan.groups:
        kept = plan.layers[group.group.kept].path
        assert group.result is not None
        for index in group.group.dropped:
            del names[plan.layers[index].path.name]
        if not kept.exists():
            assert plan.options.names != "kept"
            names[kept.name] = group.result
    for point, path in names.items():
        assert content(path, scratch) == disk.points[point], f"{point} {when}"


def plan_of(merge: Merge, disk: Disk, use: Callable[[Plan, object], None]) -> Plan:
    """Plan and hand the plan and the open chain to `use`."""
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=merge.dropped(disk)), merge.wanted())
        assert not plan.refusals, plan.refusals
        use(plan, chain)
    return plan


@pytest.mark.parametrize("merge", MERGES, ids=str)
def test_between_all_steps(scratch: Path, merge: Merge) -> None:
    """What a process that is killed there leaves behind is what is on the disk there."""
    disk = build(scratch / "images", merge.lines, NAMES)
    seen: list[Step] = []

    def run(plan: Plan, chain: object) -> None:
        def look(step: Step) -> None:
            judge(disk, plan, scratch, f"before step {len(seen)}, {step}")
            seen.append(step)

        execute(plan, chain, before_step=look)  # type: ignore[arg-type]

    plan = plan_of(merge, disk, run)
    assert len(seen) == len(plan.steps) > 8
    disk.expect(disk.after(plan))


def in_a_child(function: Callable[[], None]) -> int:
    """Call it in a copy of this process; the signal that ended it, 0 if none did."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status := os.waitpid(child, 0)[1]) else 0


class Copies:
    """A chain that is built once and copied for every case."""

    def __init__(self, scratch: Path, merge: Merge) -> None:
        self.scratch = scratch
        self.template = build(scratch / "template", merge.lines, NAMES)
        self.count = 0

    def new(self) -> Disk:
        shutil.rmtree(self.scratch / str(self.count), ignore_errors=True)
        self.count += 1
        directory = self.scratch / str(self.count)
        shutil.copytree(self.template.directory, directory)
        paths = [directory / path.name for path in self.template.paths]
        return Disk(directory, paths, self.template.points)


def settled(disk: Disk, results: dict[str, str]) -> None:
    """As `Disk.expect`, but a qemu-img that was killed may have left clusters unused."""
    for name, point in results.items():
        path = disk.directory / name
        assert content(path, disk.directory.parent) == disk.points[point], name
        if format_of(path) == "qcow2":
            assert qemu_check(path)["corruptions"] == 0, name
    assert sorted(path.name for path in disk.directory.iterdir()) == sorted(results)


def go_on(disk: Disk, merge: Merge, plan: Plan, scratch: Path, back: bool) -> None:
    """Finish what was killed: forward, or back and from the start, or anew if it never began."""
    journals = journals_at(disk.directory)
    assert len(journals) <= 1
    if journals and back:
        try:
            try:
                recover(journals, back=True)
            except Refused as error:
                # Dropped points are changed already: kept ones still have to be right.
                if "the commit had begun" not in str(error):
                    raise
                recover(journals, back=True, give_up_dropped=True)
        except Refused as error:
            assert "only go forward" in str(error)
        else:
            judge(disk, plan, scratch, "put back")
            assert not list(disk.directory.glob(".qchain*"))
    outcomes = [each.outcome for each in recover(journals_at(disk.directory))]
    assert outcomes in ([], ["finished"])
    if not outcomes and len(plan.groups) == 1:
        disk.merge(merge.dropped(disk), merge.wanted())
    elif not outcomes:
        return  # one of two groups may be merged already: there is nothing to compare with
    settled(disk, disk.after(plan))


@pytest.mark.parametrize("merge", [MERGES[n] for n in (1, 2, 3, 4, 6, 8)], ids=str)
def test_a_process_that_is_killed(scratch: Path, merge: Merge) -> None:
    """SIGKILL before every third step; over the merges every step has its turn."""
    copies = Copies(scratch, merge)
    number, count, killed = MERGES.index(merge) % 3, 3, 0
    while number < count:
        disk = copies.new()

        def run(plan: Plan, chain: object, number: int = number) -> None:
            steps = 0

            def kill(_step: Step) -> None:
                nonlocal steps
                if steps == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps += 1

            ended = in_a_child(
                lambda: execute(plan, chain, before_step=kill) and None  # type: ignore[arg-type]
            )
            assert ended == signal.SIGKILL

        plan = plan_of(merge, disk, run)
        count = len(plan.steps)
        killed += 1
        judge(disk, plan, scratch, f"killed before step {number}")
        go_on(disk, merge, plan, scratch, back=bool(killed % 2))
        number += 3
    assert killed >= 4


# --- within qemu-img --------------------------------------------------------------------


def cannot_trace() -> bool:
    probe = ["strace", "-o", os.devnull, "true"]
    return not shutil.which("strace") or subprocess.run(probe, capture_output=True).returncode != 0


WRAPPER = """#!/bin/sh
kind=$1
case " $* " in *" -u "*) kind=$1-u;; esac
if [ "$kind" != "{kind}" ] || [ -e "{mark}" ]; then exec qemu-img "$@"; fi
: >"{mark}"
strace -f -o /dev/null -e trace={call} -e inject={call}:signal=KILL:when={nth} qemu-img "$@"
code=$?
[ $code = 0 ] || {otherwise}
exit $code
"""

TORTURE = "QCHAIN_TORTURE" in os.environ
CALLS = [
    *(("pwrite64", n) for n in (range(1, 20) if TORTURE else (1, 2, 4))),
    *(("pwritev", n) for n in (range(1, 6) if TORTURE else (1, 2))),
    *(("fdatasync", n) for n in (range(1, 8) if TORTURE else (1, 2, 3))),
    *((call, n) for call in ("fallocate", "ftruncate") for n in (1,)),
]

WITHIN = [
    (MERGES[0], "rebase"),
    (MERGES[1], "rebase"),
    (MERGES[2], "commit"),
    (MERGES[3], "commit"),
    (MERGES[3], "rebase"),
    (MERGES[4], "rebase"),
    (MERGES[11], "commit"),
    (MERGES[0], "rebase-u"),
    (MERGES[4], "rebase-u"),
    (MERGES[5], "rebase-u"),
    (MERGES[6], "rebase-u"),
    (MERGES[2], "resize"),
]


@pytest.mark.skipif(cannot_trace(), reason="needs strace")
@pytest.mark.parametrize("together", [True, False], ids=["both", "qemu-img"])
@pytest.mark.parametrize(("merge", "kind"), WITHIN, ids=str)
def test_killed_within_qemu_img(scratch: Path, merge: Merge, kind: str, together: bool) -> None:
    """At its system calls; `both`: qchain dies in the same moment, and cannot put back."""
    copies = Copies(scratch, merge)
    killed = 0
    for call, nth in CALLS:
        disk = copies.new()
        wrapper, mark = scratch / "qemu-img", scratch / "mark"
        mark.unlink(missing_ok=True)
        otherwise = "kill -9 $PPID" if together else "true"
        words = {"kind": kind, "mark": mark, "call": call, "nth": nth, "otherwise": otherwise}
        wrapper.write_text(WRAPPER.format(**words))
        wrapper.chmod(0o755)

        def run(plan: Plan, chain: object, wrapper: Path = wrapper) -> None:
            def merge() -> None:
                execute(plan, chain, QemuImg(wrapper))  # type: ignore[arg-type]

            in_a_child(merge)

        plan = plan_of(merge, disk, run)
        assert mark.exists(), f"no {kind} in this merge"
        when = f"{kind} killed at {call} {nth}"
        judge(disk, plan, scratch, when)
        after = disk.after(plan)
        if sorted(path.name for path in disk.directory.iterdir()) != sorted(after):
            killed += 1
            go_on(disk, merge, plan, scratch, back=bool(killed % 2))
        else:
            settled(disk, after)
    assert killed >= 2, "the injection did not work: nothing was proven"
