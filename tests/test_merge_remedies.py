"""Each trap of qemu-img once more (numbers as in test_traps), and what qchain does about it.

Every test first shows what the bare command does on the very chain, then that a merge of it
is right. The docstrings name the lines that are the remedy: without them the test fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from merging import Disk, build
from test_traps import cannot_trace, kill_points, killed_run, own_map, plain_rebase

from fixtures.oracle import QemuError, qemu_img, raw_of
from qchain.chain.chain import open_chain
from qchain.errors import FailedMidway
from qchain.plan.candidates import Candidate
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Request
from qchain.run import locking
from qchain.run.execute import execute
from qchain.run.qemu_img import QemuImg

K, M = 1024, 1024 * 1024
NAMES = ("base", "mid", "top")


def names_of(disk: Disk, *stems: str) -> tuple[str, ...]:
    return tuple(path.name for path in disk.paths if path.stem in stems)


def planned(disk: Disk, drop: Sequence[str], **asked: str) -> tuple[Plan, dict[str, Candidate]]:
    """The plan, and the candidates of its one group by strategy."""
    plan = disk.plan(Request(drop=names_of(disk, *drop)), MergeOptions(**asked))  # type: ignore[arg-type]
    return plan, {candidate.strategy: candidate for candidate in plan.groups[0].candidates}


def used(path: Path) -> int:
    """The length of a qcow2 file in whole clusters, what a raw one takes on the disk."""
    if path.suffix == ".qcow2":
        return -(-path.stat().st_size // (64 * K)) * 64 * K
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_blocks * 512


def copy_of(disk: Disk) -> dict[str, Path]:
    """The same chain in another directory, for the bare command."""
    directory = disk.directory.with_name("bare")
    copy = ["cp", "-a", "--sparse=auto", "--", disk.directory, directory]
    subprocess.run(copy, check=True)
    return {path.stem: directory / path.name for path in disk.paths}


WRAPPER = """#!/bin/sh
case "$1 $*" in *" -u "*) exec qemu-img "$@";; rebase*) ;; *) exec qemu-img "$@";; esac
strace -f -o /dev/null -e trace={call} -e inject={call}:signal=KILL:when={nth} qemu-img "$@" ||
    kill -9 $PPID
"""


@pytest.mark.skipif(cannot_trace(), reason="needs strace")
@pytest.mark.parametrize("flat", [False, True])
def test_trap_0_a_pull_may_be_killed(tmp_path: Path, flat: bool) -> None:
    """Remedy: the aliases in `plan.sequence._Builder.pull`, which hide the header's early switch.

    Killed together with qchain, so nothing is put back.
    """
    lost, killed = [], 0
    for number, (call, nth) in enumerate(kill_points()):
        lines = ["[raw] 768k:A 256k:-", "128k:- 256k:B 128k:- 64k:0", "192k:- 64k:C"]
        disk = build(tmp_path / str(number) / "images", lines, NAMES)
        bare = copy_of(disk)
        killed_run(plain_rebase(bare["top"], bare["base"], flat), bare["top"].parent, call, nth)
        if raw_of(bare["top"]) != disk.points["top.qcow2"]:
            lost.append((call, nth))
        wrapper = tmp_path / str(number) / "qemu-img"
        wrapper.write_text(WRAPPER.format(call=call, nth=nth))
        wrapper.chmod(0o755)
        drop = ("base", "mid") if flat else ("mid",)
        with open_chain(disk.active) as chain:
            request = Request(drop=names_of(disk, *drop))
            plan = make_plan(chain, request, MergeOptions(strategy="pull"))
            child = os.fork()
            if child == 0:
                try:
                    execute(plan, chain, QemuImg(wrapper))
                finally:
                    os._exit(0)
            killed += os.waitpid(child, 0)[1] == signal.SIGKILL
        assert raw_of(disk.active) == disk.points["top.qcow2"], (call, nth)
    assert lost, "rebase has become crash-safe: the two-phase pull is no longer needed"
    assert killed >= 2, "the injection did not work: nothing was proven"


def test_trap_1_no_copy_onto_a_deeper_backing(tmp_path: Path) -> None:
    """Remedy: over its immediate backing, then a rebase of the copy onto the deeper one."""
    lines = ["512k:A", "64k:- 128k:B", "64k:- 64k:- 128k:C", "64k:D"]
    disk = build(tmp_path / "images", lines, ("base", "mid", "low", "top"))
    bare = copy_of(disk)
    out = tmp_path / "out"
    qemu_img("convert", "-O", "qcow2", "-B", bare["base"], "-F", "qcow2", bare["top"], out)
    assert raw_of(out) != disk.points["top.qcow2"]
    disk.merge(names_of(disk, "mid", "low"), MergeOptions(strategy="copy"))
    disk.expect({"base.qcow2": "base.qcow2", "top.qcow2": "top.qcow2"})


def test_trap_2_zero_clusters_stay_zero_clusters(tmp_path: Path) -> None:
    """Remedy: `plan.traffic` counts the zero clusters that a pull has to write as data."""
    disk = build(tmp_path / "images", ["1M:A", "512k:0", "960k:- 64k:B"], NAMES)
    bare = copy_of(disk)
    before = used(bare["top"])
    qemu_img("rebase", "-f", "qcow2", "-b", bare["base"], "-F", "qcow2", bare["top"])
    grown = used(bare["top"]) - before
    assert grown >= 512 * K
    plan, candidates = planned(disk, ("mid",))
    assert candidates["pull"].write_bytes >= grown // (64 * K) * (64 * K)
    assert candidates["pull"].target_growth_bytes >= grown
    assert plan.groups[0].chosen is candidates["commit"]
    disk.merge(["mid.qcow2"])
    disk.expect({"base.qcow2": "base.qcow2", "top.qcow2": "top.qcow2"})
    zeroes = sum(int(str(e["length"])) for e in own_map(disk.active) if e["zero"])
    assert zeroes == 512 * K


def test_trap_3_a_commit_that_writes_what_is_there_already(tmp_path: Path) -> None:
    """Remedy: `plan.traffic` counts allocation, not difference: what a commit writes, and the
    most that a pull may write."""
    disk = build(tmp_path / "images", ["[size=1M]", "512k:. 64k:-", "64k:B"], NAMES)
    bare = copy_of(disk)
    before = {name: used(path) for name, path in bare.items()}
    qemu_img("rebase", "-f", "qcow2", "-b", bare["base"], "-F", "qcow2", bare["top"])
    assert used(bare["top"]) == before["top"]
    qemu_img("commit", "-d", "-f", "qcow2", bare["mid"])
    grown = used(bare["base"]) - before["base"]
    assert grown >= 512 * K
    # The point mid goes into the file base: written in full, though it reads the same.
    plan, candidates = planned(disk, ("base",), strategy="commit", names="lowest")
    assert plan.groups[0].chosen is candidates["commit"]
    assert candidates["commit"].write_bytes == 512 * K
    assert grown <= candidates["commit"].target_growth_bytes <= grown + 256 * K
    disk.merge(["base.qcow2"], MergeOptions(strategy="commit", names="lowest"))
    disk.expect({"base.qcow2": "mid.qcow2", "top.qcow2": "top.qcow2"})
    assert used(disk.directory / "base.qcow2") - before["base"] == grown


def test_trap_4_the_granularity_of_the_base(tmp_path: Path) -> None:
    """Remedy: `plan.traffic.commit_granularity`: 4K of data in a raw base are 64K of writes."""
    disk = build(tmp_path / "images", ["[raw size=1M]", "[cluster=4k] 128k:- 4k:A", "4k:-"], NAMES)
    bare = copy_of(disk)
    before = used(bare["base"])
    qemu_img("commit", "-d", "-f", "qcow2", bare["mid"])
    assert used(bare["base"]) - before == 64 * K
    _, candidates = planned(disk, ("base",), names="lowest")
    assert candidates["commit"].write_bytes == 64 * K
    assert candidates["pull"].write_bytes <= 4 * K  # the first block of a new raw file
    disk.merge(["base.raw"], MergeOptions(strategy="commit", names="lowest"))
    disk.expect({"base.raw": "mid.qcow2", "top.qcow2": "top.qcow2"})


def test_trap_5_single_sectors_cost_whole_clusters(tmp_path: Path) -> None:
    """Remedy: `plan.growth` counts the clusters of the target that are touched, not the bytes."""
    sectors = "512:B 65024:- " * 8
    lines = ["1M:A", f"[cluster=512 size=1M] {sectors}", "[size=1M]"]
    disk = build(tmp_path / "images", lines, NAMES)
    bare = copy_of(disk)
    before = used(bare["top"])
    qemu_img("rebase", "-f", "qcow2", "-b", bare["base"], "-F", "qcow2", bare["top"])
    grown = used(bare["top"]) - before
    assert grown >= 512 * K
    _, candidates = planned(disk, ("mid",), strategy="pull")
    assert candidates["pull"].target_growth_bytes >= grown
    disk.merge(["mid.qcow2"], MergeOptions(strategy="pull"))
    disk.expect({"base.qcow2": "base.qcow2", "top.qcow2": "top.qcow2"})


@pytest.mark.parametrize("remedy", [True, False])
def test_trap_6_our_own_locks_do_not_break_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remedy: bool
) -> None:
    """Remedy: `ChainLocks.handed_over` gives up "consistent read" of what lies between."""
    lines = ["512k:A", "64k:B", "64k:- 64k:C", "128k:- 64k:D"]
    disk = build(tmp_path / "images", lines, ("base", "mid", "low", "top"))
    if not remedy:
        monkeypatch.setattr(locking, "keep_unshared", lambda _fd: None)
    options = MergeOptions(strategy="commit")
    if remedy:
        disk.merge(names_of(disk, "mid", "low"), options)
        disk.expect({"base.qcow2": "base.qcow2", "top.qcow2": "top.qcow2"})
    else:
        with pytest.raises(FailedMidway, match="consistent read"):
            disk.merge(names_of(disk, "mid", "low"), options)
        disk.expect({path.name: path.name for path in disk.paths})


def test_trap_7_exit_code_0_is_not_evidence(tmp_path: Path) -> None:
    """Remedies: `file_refusals` (bitmaps would be lost), the `Compare` step before `switch`."""
    disk = build(tmp_path / "images", ["512k:A", "64k:B", "64k:- 64k:C"], NAMES)
    liar = tmp_path / "qemu-img"
    liar.write_text('#!/bin/sh\n[ "$1" = commit ] || exec qemu-img "$@"\n')
    liar.chmod(0o755)
    with pytest.raises(FailedMidway, match="differs"):
        disk.merge(["mid.qcow2"], MergeOptions(strategy="commit"), qemu=QemuImg(liar))
    disk.expect({path.name: path.name for path in disk.paths})
    qemu_img("bitmap", "--add", "-f", "qcow2", disk.directory / "mid.qcow2", "b")
    plan, _ = planned(disk, ("mid",), strategy="commit")
    assert any("bitmaps" in line for line in plan.refusals)


@pytest.mark.parametrize("base", ["2M:A", "[raw] 2M:A"])
@pytest.mark.parametrize("top", [M, M + 512, 64 * K])
def test_trap_8_a_shorter_top_shortens_the_result(tmp_path: Path, base: str, top: int) -> None:
    """Remedy: the resize in `_Builder.commit`; and `Compare` does not let another size pass."""
    lines = [base, f"[size={top}] 64k:B", "[size=3M] 32k:- 64k:C"]
    disk = build(tmp_path / "images", lines, NAMES)
    bare = copy_of(disk)
    fmt = "raw" if "raw" in base else "qcow2"
    qemu_img("commit", "-d", "-f", "qcow2", bare["mid"])
    assert len(raw_of(bare["base"], fmt)) == 2 * M
    disk.merge(names_of(disk, "base"), MergeOptions(strategy="commit", names="lowest"))
    disk.expect({bare["base"].name: "mid.qcow2", "top.qcow2": "top.qcow2"})
    assert len(disk.points["mid.qcow2"]) == top


@pytest.mark.parametrize("strategy", ["pull", "commit"])
def test_trap_9_past_the_end_of_a_short_layer(tmp_path: Path, strategy: str) -> None:
    """Remedy: `plan.traffic` and `chain.resolve` take what is past a layer's end for its zeroes."""
    disk = build(tmp_path / "images", ["2M:A", "[size=1M]", "[size=2M] 64k:B"], NAMES)
    _, candidates = planned(disk, ("mid",))
    # mid allocates nothing, and yet a megabyte is to be looked at, and written as zeroes.
    assert candidates["pull"].read_bytes == M
    assert candidates["pull"].write_bytes == 0
    before = used(disk.active)
    disk.merge(["mid.qcow2"], MergeOptions(strategy=strategy))
    disk.expect({"base.qcow2": "base.qcow2", "top.qcow2": "top.qcow2"})
    if strategy == "pull":
        zeroes = [e for e in own_map(disk.active) if e["start"] == M]
        assert [e["length"] for e in zeroes] == [M]
        assert used(disk.active) - before <= candidates["pull"].target_growth_bytes


def test_trap_10_an_old_image_that_cannot_grow(tmp_path: Path) -> None:
    """Remedy: `candidates.obstacle` knows it beforehand, and another target is taken."""
    lines = ["[raw] 4M:A", "[v2 size=1M] 128k:B", "[size=2M] 64k:C"]
    disk = build(tmp_path / "images", lines, NAMES)
    bare = copy_of(disk)
    with pytest.raises(QemuError, match="Operation not supported"):
        qemu_img("commit", "-d", "-f", "qcow2", "-b", bare["mid"], bare["top"])
    plan, candidates = planned(disk, ("mid",), strategy="commit")
    assert "amend" in (candidates["commit"].reason or "")
    assert plan.refusals and not plan.steps
    disk.merge(["mid.qcow2"])
    disk.expect({"base.raw": "base.raw", "top.qcow2": "top.qcow2"})


def test_trap_10_and_what_the_reason_says_helps(tmp_path: Path) -> None:
    lines = ["[raw] 4M:A", "[v2 size=1M] 128k:B", "[size=2M] 64k:C"]
    disk = build(tmp_path / "images", lines, NAMES)
    qemu_img("amend", "-f", "qcow2", "-o", "compat=1.1", disk.directory / "mid.qcow2")
    disk.merge(["mid.qcow2"], MergeOptions(strategy="commit"))
    disk.expect({"base.raw": "base.raw", "top.qcow2": "top.qcow2"})


def test_the_bare_commands_are_not_in_any_plan(tmp_path: Path) -> None:
    """No `rebase` that is neither the safe one nor of the header alone, no format left open."""
    disk = build(
        tmp_path / "images",
        ["512k:A", "64k:B", "64k:- 64k:C", "64k:D"],
        ("base", "mid", "low", "top"),
    )
    for strategy in ("pull", "commit", "both"):
        for names in ("kept", "lowest", "target"):
            options = MergeOptions(strategy=strategy, names=names)
            plan = disk.plan(Request(drop=("mid.qcow2", "low.qcow2")), options)
            commands = [getattr(step, "argv", ()) for step in plan.steps]
            for argv in filter(None, commands):
                assert argv[0] != "convert"
                assert {"-f", "--image-opts"} & set(argv), argv
                assert "-b" not in argv or argv[0] == "commit" or {"-F"} <= set(argv), argv
                if argv[0] == "rebase" and "-u" not in argv:
                    assert argv[argv.index("-b") + 1].startswith(".qchain-")
