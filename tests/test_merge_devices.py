"""Chains on block devices, as LVM gives them: merged in place, nothing renamed or deleted.

Loop devices stand for logical volumes, named by links as LVM names its own.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cli_runner import command, run
from merging import Disk
from stopping import killed

from fixtures.build import build_chain
from fixtures.oracle import qemu_check, qemu_img, raw_of
from fixtures.shadow import shadow_points
from qchain.chain.chain import open_chain
from qchain.chain.gate import Gate
from qchain.errors import ExitCode, FailedMidway, Refused
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Confirm
from qchain.run.execute import execute
from qchain.run.qemu_img import QemuImg
from qchain.run.recover import journals_at, recover

LINES = [
    "512k:A 512k:-",
    "64k:B 64k:- 64k:B 64k:- 64k:0 64k:- 128k:B",
    "128k:C 64k:- 64k:C",
    "64k:D 192k:- 64k:D",
]
NAMES = ("base", "a", "b", "top")
ROOM = 4 << 20
GATE = Gate(follow=True)


@pytest.fixture
def attached() -> Iterator[list[str]]:
    made: list[str] = []
    yield made
    for device in made:
        subprocess.run(["losetup", "-d", device], check=True)


def volumes(
    directory: Path,
    attached: list[str],
    lines: Sequence[str] = LINES,
    devices: Sequence[str] = NAMES,
    room: int = ROOM,
) -> Disk:
    """The chain with some of its images on devices, all in one directory, named by links."""
    chain = build_chain(directory / "made", lines, NAMES)
    place = directory / "vg"
    place.mkdir()
    paths = []
    for path in chain.paths:
        name = place / path.name
        if path.stem in devices:
            with path.open("r+b") as file:
                file.truncate(max(room, path.stat().st_size))
            done = subprocess.run(
                ["losetup", "--show", "-f", path], capture_output=True, text=True, check=True
            )
            attached.append(done.stdout.strip())
            name.symlink_to(attached[-1])
        else:
            path.rename(name)
        paths.append(name)
    points = shadow_points(lines)
    named = {path.name: point for path, point in zip(paths, points, strict=True)}
    return Disk(place, paths, named)


def expect(disk: Disk, results: dict[str, str]) -> None:
    for name, point in results.items():
        path = disk.directory / name
        assert raw_of(path, "qcow2") == disk.points[point], f"{name} does not read as {point} did"
        assert qemu_check(path)["corruptions"] == 0, name


def left(disk: Disk) -> set[str]:
    return {path.name for path in disk.directory.iterdir()}


def plan_of(disk: Disk, drop: Sequence[str], options: MergeOptions) -> Plan:
    with open_chain(disk.active, GATE) as chain:
        return make_plan(chain, Request(drop=tuple(drop)), options)


CASES = [
    ("pull", "kept", ("a.qcow2", "b.qcow2"), NAMES, "top.qcow2"),
    ("pull", "kept", ("base.qcow2", "a.qcow2", "b.qcow2"), NAMES, "top.qcow2"),
    ("pull", "target", ("a.qcow2",), NAMES, "b.qcow2"),
    ("pull", "kept", ("b.qcow2",), ("top",), "top.qcow2"),
    ("commit", "lowest", ("a.qcow2", "b.qcow2"), NAMES, "a.qcow2"),
    ("commit", "target", ("a.qcow2", "b.qcow2"), ("a", "base"), "a.qcow2"),
    ("both", "target", ("a.qcow2", "b.qcow2"), NAMES, "b.qcow2"),
    # A file in the middle of devices: two phases, as ever.
    ("pull", "kept", ("a.qcow2",), ("base", "a"), "b.qcow2"),
]


@pytest.mark.parametrize(("strategy", "names", "drop", "devices", "result"), CASES)
def test_a_merge_in_place(
    tmp_path: Path,
    attached: list[str],
    strategy: str,
    names: str,
    drop: tuple[str, ...],
    devices: tuple[str, ...],
    result: str,
) -> None:
    disk = volumes(tmp_path, attached, devices=devices)
    before = left(disk)
    options = MergeOptions(strategy=strategy, names=names)
    plan, _ = disk.merge(drop, options, gate=GATE)
    (group,) = plan.groups
    kept = plan.layers[group.group.kept].path.name
    expect(disk, {result: kept})
    if "top" in devices:
        expect(disk, {"top.qcow2": "top.qcow2"})
    if "base.qcow2" not in drop:
        expect(disk, {"base.qcow2": "base.qcow2"})
    # A file that is not needed goes; a device is the administrator's.
    gone = {f"{name}.qcow2" for name in NAMES if name not in devices} & {*drop, kept} - {result}
    assert left(disk) == before - gone
    backing = disk.backing_of(result)
    lower = [f"{name}.qcow2" for name in NAMES if f"{name}.qcow2" not in drop]
    expected = lower[lower.index(kept) - 1] if lower.index(kept) else None
    assert (None if backing[0] is None else Path(backing[0]).name) == expected


@pytest.mark.parametrize(("strategy", "names", "drop", "devices", "result"), CASES)
def test_killed_before_every_step(
    tmp_path: Path,
    attached: list[str],
    strategy: str,
    names: str,
    drop: tuple[str, ...],
    devices: tuple[str, ...],
    result: str,
) -> None:
    """The kept points read right by what is there, and `recover` ends as the merge would have."""
    options = MergeOptions(strategy=strategy, names=names)
    number, came = int(strategy == "both"), True
    while came:
        directory = tmp_path / str(number)
        disk = volumes(directory, attached, devices=devices)
        before = left(disk)
        with open_chain(disk.active, GATE) as chain:
            plan = make_plan(chain, Request(drop=drop), options)
            assert not plan.refusals
            kept = plan.layers[plan.groups[0].group.kept].path.name
            came = killed(plan, chain, lambda seen, _step, at=number: seen == at)
        expect(disk, {"top.qcow2": "top.qcow2"} if (disk.directory / "top.qcow2").exists() else {})
        recover(journals_at(disk.directory))
        expect(disk, {result: kept})
        work = {name for name in left(disk) if name.startswith(".qchain")}
        assert not work and left(disk) <= before
        while attached:
            subprocess.run(["losetup", "-d", attached.pop()], check=True)
        number += 3


def test_a_pull_writes_the_header_last(tmp_path: Path, attached: list[str]) -> None:
    """There is no alias for a device: qemu-img itself must keep the order, or data is lost."""
    disk = volumes(tmp_path, attached)
    plan = plan_of(disk, ["a.qcow2", "b.qcow2"], MergeOptions(strategy="pull"))
    (argv,) = (
        step.argv for step in plan.steps
        if getattr(step, "argv", ("",))[0] == "rebase" and "-u" not in step.argv
    )  # fmt: skip
    assert argv[argv.index("-t") + 1] == "writethrough"
    # With lazy refcounts it flushes a cluster and the table that names it together.
    assert "lazy-refcounts=off" in argv[-1].split(",")


@pytest.mark.parametrize("call", ["pwrite64", "fdatasync"])
def test_killed_within_the_pull(tmp_path: Path, attached: list[str], call: str) -> None:
    """At its first, second, ... such call, until it comes to its end."""
    program = tmp_path / "qemu-img"
    moment, code = 0, ExitCode.FAILED
    while code == ExitCode.FAILED:
        moment += 1
        disk = volumes(tmp_path / str(moment), attached)
        program.write_text(
            '#!/bin/sh\ncase "$*" in *writethrough*) ;; *) exec qemu-img "$@" ;; esac\n'
            f"exec strace -qq -f -o /dev/null -e inject={call}:signal=KILL:when={moment} "
            'qemu-img "$@"\n'
        )
        program.chmod(0o755)
        done = command(
            "merge", "--follow", "--yes", "--drop", "a.qcow2", "--drop", "b.qcow2", "--strategy",
            "pull", str(disk.active), QCHAIN_QEMU_IMG=str(program),
        )  # fmt: skip
        code = done.code
        assert code in (ExitCode.DONE, ExitCode.FAILED), done.err
        expect(disk, {"top.qcow2": "top.qcow2", "base.qcow2": "base.qcow2"})
        recover(journals_at(disk.directory))
        if disk.backing_of("top.qcow2")[0] == "b.qcow2":
            disk.merge(["a.qcow2", "b.qcow2"], MergeOptions(strategy="pull"), gate=GATE)
        expect(disk, {"top.qcow2": "top.qcow2", "base.qcow2": "base.qcow2"})
        assert disk.backing_of("top.qcow2")[0] == "base.qcow2"
        while attached:
            subprocess.run(["losetup", "-d", attached.pop()], check=True)
    assert moment > 3, "too few were killed to show anything"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (MergeOptions(strategy="commit"), "is a block device and cannot be renamed"),
        (MergeOptions(strategy="pull", names="lowest"), "is a block device and cannot be renamed"),
        (MergeOptions(strategy="copy"), "is a block device and cannot be renamed"),
    ],
)
def test_what_needs_a_rename_is_refused(
    tmp_path: Path, attached: list[str], options: MergeOptions, why: str
) -> None:
    disk = volumes(tmp_path, attached)
    plan = plan_of(disk, ["a.qcow2"], options)
    assert any(why in line for line in plan.refusals), plan.refusals


def test_auto_takes_what_is_possible(tmp_path: Path, attached: list[str]) -> None:
    disk = volumes(tmp_path, attached)
    (group,) = plan_of(disk, ["a.qcow2"], MergeOptions()).groups
    assert group.chosen is not None and group.chosen.strategy == "pull"


def test_a_device_too_small(tmp_path: Path, attached: list[str]) -> None:
    disk = volumes(tmp_path, attached, room=0)
    plan = plan_of(disk, ["base.qcow2", "a.qcow2", "b.qcow2"], MergeOptions(strategy="pull"))
    assert any("is a block device of" in line for line in plan.refusals), plan.refusals


def test_the_plan_says_what_stays(tmp_path: Path, attached: list[str]) -> None:
    disk = volumes(tmp_path, attached)
    words = ("plan", "--follow", "--drop", "a.qcow2", str(disk.active))
    text = " ".join(run(*words).out.split())
    assert "a.qcow2, a block device: nothing needs it then, remove it" in text
    assert "deletes" not in text
    document = json.loads(run(*words, "--json").out)
    assert not any("unlink" in step for step in document["steps"] if "a.qcow2" in str(step))


def test_a_refused_plan_frees_nothing(tmp_path: Path, attached: list[str]) -> None:
    disk = volumes(tmp_path, attached)
    other = disk.directory / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "b.qcow2", "-F", "qcow2", other, "1M")
    refused = run("plan", "--follow", "--drop", "a.qcow2", "--drop", "b.qcow2", disk.active)
    assert refused.code == ExitCode.REFUSED
    assert "nothing needs it" not in " ".join(refused.out.split())


def test_times_of_device_nodes_say_nothing(tmp_path: Path, attached: list[str]) -> None:
    disk = volumes(tmp_path, attached)
    done = run("chain", "--follow", disk.active)
    assert "was written at" not in done.out + done.err


def test_a_raw_base_on_a_device(tmp_path: Path, attached: list[str]) -> None:
    """A template on a volume: the overlay is committed into it, byte by byte."""
    raw = tmp_path / "raw"
    raw.write_bytes(b"R" * (1 << 20))
    done = subprocess.run(["losetup", "--show", "-f", raw], capture_output=True, text=True,
                          check=True)  # fmt: skip
    attached.append(done.stdout.strip())
    place = tmp_path / "vg"
    place.mkdir()
    (place / "base").symlink_to(attached[-1])
    top = place / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", top)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 64k 128k", top], check=True)
    expected = raw_of(top, "qcow2")
    with open_chain(top, GATE) as chain:
        options = MergeOptions(strategy="commit", names="lowest")
        plan = make_plan(chain, Request(drop=("base",)), options)
        assert not plan.refusals, plan.refusals
        execute(plan, chain)
    assert not top.exists()
    assert raw_of(place / "base", "raw") == expected == raw.read_bytes()


def test_a_device_written_to_meanwhile(tmp_path: Path, attached: list[str]) -> None:
    """A lie within: what qemu-img did not move is found missing, and nothing is lost."""
    disk = volumes(tmp_path, attached)
    program = tmp_path / "qemu-img"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *writethrough*) exit 0 ;; *) exec qemu-img "$@" ;; esac\n'
    )
    program.chmod(0o755)
    with pytest.raises(FailedMidway):
        disk.merge(["a.qcow2"], MergeOptions(strategy="pull"), qemu=QemuImg(program), gate=GATE)
    expect(disk, {name: name for name in disk.points})


@pytest.mark.parametrize("device", [True, False])
def test_going_back_to_what_is_gone(tmp_path: Path, attached: list[str], device: bool) -> None:
    """The header names the new backing file already: a dropped image that is gone is not needed."""
    disk = volumes(tmp_path, attached, devices=NAMES if device else ())
    plan = plan_of(disk, ["a.qcow2", "b.qcow2"], MergeOptions(strategy="pull"))
    confirmed = next(n for n, step in enumerate(plan.steps) if isinstance(step, Confirm))
    with open_chain(disk.active, GATE) as chain:
        plan = make_plan(chain, Request(drop=("a.qcow2", "b.qcow2")), MergeOptions("pull"))
        assert killed(plan, chain, lambda seen, _step: seen == confirmed + 1)
    aside = disk.directory / "aside"
    gone = disk.directory / "a.qcow2"
    gone.rename(aside)
    assert raw_of(disk.active, "qcow2") == disk.points["top.qcow2"]
    with pytest.raises(Refused, match="would back on it again"):
        recover(journals_at(disk.directory), back=True)
    assert raw_of(disk.active, "qcow2") == disk.points["top.qcow2"]
    aside.rename(gone)
    recover(journals_at(disk.directory), back=True)
    expect(disk, {name: name for name in disk.points})
