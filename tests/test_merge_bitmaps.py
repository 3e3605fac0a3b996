"""Bitmaps when layers merge: carried or dropped, also where the merge is killed.

Judged by what was written while a bitmap recorded, and by qemu-nbd, which exports the ranges
of a bitmap; never by qchain's own reader.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cli_runner import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging import Disk
from stopping import stopped, the_journal
from test_bitmaps import Ranges, expected, exported
from test_traps import needs_strace

from fixtures.oracle import qemu_check, qemu_img, qemu_info, qemu_io, raw_of, run_tool
from qchain.chain.chain import open_chain
from qchain.chain.chain_tree import open_tree
from qchain.errors import FailedMidway, Refused
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Rename, shell_line
from qchain.qcow2.newbitmaps import NewBitmap, union, write_bitmaps
from qchain.run.execute import execute
from qchain.run.qemu_img import QemuImg
from qchain.run.recover import journals_at, recover

TORTURE = "QCHAIN_TORTURE" in os.environ
STRIDE = 1 if TORTURE else 7
M = 1 << 20
SIZE = 8 * M
K64 = 65536
DROP = ("mon.qcow2", "tue.qcow2")
GUEST = (7 * M + 4096, 512)


@dataclass
class Marked:
    """An image, and the writes that each of its bitmaps saw; `plain`: what none of them saw.

    `bitmaps`: name -> (granularity, recording, writes). Those that do not record are stopped
    after their writes.
    """

    bitmaps: dict[str, tuple[int, bool, Ranges]] = field(default_factory=dict)
    plain: Ranges = field(default_factory=list)
    options: str = ""


WEEK = {
    "base": Marked({"b": (K64, True, [])}, [(0, SIZE // 2)]),
    "mon": Marked({"old": (4096, False, [(M, 100)]), "b": (4096, True, [(M + K64, 512)])}),
    "tue": Marked({"b": (K64, True, [(2 * M - 5, 10), (3 * M, K64)])}, [(5 * M, K64)]),
    "wed": Marked({"b": (K64, True, [(3 * M, K64), (SIZE - 512, 512)])}),
}
"""In all layers b, without a gap. In mon one that has stopped. 'plain' of tue: before b."""


def week(directory: Path, layers: dict[str, Marked] | None = None) -> Disk:
    directory.mkdir()
    paths: list[Path] = []
    for name, layer in (layers or WEEK).items():
        path = directory / f"{name}.qcow2"
        over = ["-b", paths[-1].name, "-F", "qcow2"] if paths else []
        words = ["-o", layer.options] if layer.options else []
        qemu_img("create", "-q", "-f", "qcow2", *words, *over, path, str(SIZE))
        write(path, layer.plain)
        for bitmap, (granularity, recording, writes) in layer.bitmaps.items():
            qemu_img("bitmap", "--add", "--enable", "-g", str(granularity), "--", path, bitmap)
            write(path, writes)
            if not recording:
                qemu_img("bitmap", "--disable", "--", path, bitmap)
        paths.append(path)
    return Disk(directory, paths, {path.name: raw_of(path) for path in paths})


def write(path: Path, ranges: Ranges, pattern: int = 0x5A) -> None:
    if ranges:
        commands = [f"write -q -P {pattern} {start} {length}" for start, length in ranges]
        qemu_io(path, commands, "qcow2")


def marked(names: Iterable[str], bitmap: str, layers: dict[str, Marked] | None = None) -> Ranges:
    """All writes that the bitmaps of one name saw, in whole units of each; base first."""
    out: Ranges = []
    for name in names:
        granularity, _, writes = (layers or WEEK)[name].bitmaps.get(bitmap, (512, True, []))
        out += expected(writes, granularity, SIZE)
    return out


def has(path: Path, wanted: dict[str, tuple[int, bool, Ranges]]) -> None:
    """These bitmaps, with granularity, flag and exactly these ranges, and no others."""
    found = qemu_info(path)["format-specific"]["data"].get("bitmaps", [])
    assert {each["name"]: (each["granularity"], each["flags"]) for each in found} == {
        name: (granularity, ["auto"] if auto else [])
        for name, (granularity, auto, _) in wanted.items()
    }
    for name, (granularity, _, ranges) in wanted.items():
        assert exported(path, name) == expected(ranges, granularity, SIZE), name


def run_guest(path: Path) -> None:
    """It writes to `GUEST`; qemu may say that it found bitmaps that are no good any more."""
    run_tool(["qemu-io", "-f", "qcow2", "-c", f"write -q -P 119 {GUEST[0]} {GUEST[1]}", path])


def covers(ranges: Ranges, wanted: Ranges) -> bool:
    """Whether `ranges` mark all of `wanted`."""
    return expected([*ranges, *wanted], 1, SIZE) == expected(ranges, 1, SIZE)


CARRIED = {
    "b": (K64, True, marked(("mon", "tue", "wed"), "b")),
    "old": (4096, False, marked(("mon",), "old")),
}
WRITTEN = expected(
    [
        span
        for name in ("mon", "tue", "wed")
        for spans in (WEEK[name].plain, *(each[2] for each in WEEK[name].bitmaps.values()))
        for span in spans
    ],
    K64,
    SIZE,
)
"""What mon, tue and wed hold."""
WAYS = [(s, n) for s in ("pull", "commit", "both") for n in ("kept", "lowest", "target")]


# --- as it should be --------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "names"), WAYS)
def test_carried(tmp_path: Path, strategy: str, names: str) -> None:
    disk = week(tmp_path / "d")
    options = MergeOptions(strategy=strategy, names=names, bitmaps="carry")
    plan, _ = disk.merge(DROP, options)
    disk.expect(disk.after(plan))
    result = plan.groups[0].result
    assert result is not None
    has(result, CARRIED)
    has(disk.paths[0], {"b": WEEK["base"].bitmaps["b"]})
    # It goes on recording.
    write(result, [GUEST])
    assert covers(exported(result, "b"), [*CARRIED["b"][2], GUEST])


@pytest.mark.parametrize(("strategy", "names"), WAYS)
def test_dropped(tmp_path: Path, strategy: str, names: str) -> None:
    """None survives: wed's alone would seem to continue base's, and lack mon's and tue's."""
    disk = week(tmp_path / "d")
    options = MergeOptions(strategy=strategy, names=names, bitmaps="drop")
    plan, _ = disk.merge(DROP, options)
    disk.expect(disk.after(plan))
    assert plan.groups[0].result is not None
    has(plan.groups[0].result, {})
    assert {(lost.image.stem, lost.name) for lost in plan.groups[0].bitmaps.lost} == {
        ("mon", "old"), ("mon", "b"), ("tue", "b"), ("wed", "b"),
    }  # fmt: skip


def test_a_pull_leaves_what_is_the_kept_images_alone(tmp_path: Path) -> None:
    layers = {
        **WEEK,
        "wed": Marked({**WEEK["wed"].bitmaps, "new": (K64, True, [(6 * M, 512)])}),
    }
    disk = week(tmp_path / "d", layers)
    plan, _ = disk.merge(DROP, MergeOptions(strategy="pull", bitmaps="drop"))
    disk.expect(disk.after(plan))
    names = [each["name"] for each in qemu_info(disk.active)["format-specific"]["data"]["bitmaps"]]
    assert names == ["new"]
    assert covers(exported(disk.active, "new"), [(6 * M, K64)])


def test_flattened(tmp_path: Path) -> None:
    disk = week(tmp_path / "d")
    for target in ("commit", "pull"):
        done = week(tmp_path / target)
        plan, _ = done.merge(
            request=Request(flatten=True), options=MergeOptions(strategy=target, bitmaps="carry")
        )
        done.expect(done.after(plan))
        has(done.active, CARRIED)
    assert disk.points.keys() >= {"wed.qcow2"}


def test_what_a_gap_makes_worthless_is_not_carried(tmp_path: Path) -> None:
    """tue does not continue c: what was written there, no c knows. Neither does d's."""
    layers = {
        "base": Marked({"d": (K64, True, [(0, 512)])}, [(0, SIZE)]),
        "mon": Marked({"c": (K64, True, [(M, 512)])}),
        "tue": Marked({}, [(2 * M, 512)]),
        "wed": Marked({"d": (K64, True, [(3 * M, 512)]), "e": (K64, True, [(4 * M, 512)])}),
    }
    for strategy in ("pull", "commit", "both"):
        disk = week(tmp_path / strategy, layers)
        plan, _ = disk.merge(DROP, MergeOptions(strategy=strategy, bitmaps="carry"))
        disk.expect(disk.after(plan))
        has(disk.active, {"e": (K64, True, [(4 * M, 512)])})
        assert {(each.name, each.why) for each in plan.groups[0].bitmaps.lost} == {
            ("c", "wed.qcow2 does not continue it"),
            ("d", "tue.qcow2 does not continue it"),
        }


def make_stale(path: Path) -> None:
    """As a process that was killed leaves the bitmaps of what it had open for writing."""
    process = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("length\n")
    process.stdin.flush()
    while "MiB" not in process.stdout.readline():
        pass
    process.kill()
    process.communicate()
    flags = [each["flags"] for each in qemu_info(path)["format-specific"]["data"]["bitmaps"]]
    assert all("in-use" in each for each in flags)


@pytest.mark.parametrize("mode", ["carry", "drop"])
@pytest.mark.parametrize("strategy", ["pull", "commit", "both"])
@pytest.mark.parametrize("where", ["mon", "tue", "wed"])
def test_stale_ones_go(tmp_path: Path, mode: str, strategy: str, where: str) -> None:
    """And what they leave a gap for; a target with stale ones could not grow either."""
    disk = week(tmp_path / "d")
    make_stale(disk.directory / f"{where}.qcow2")
    plan, _ = disk.merge(DROP, MergeOptions(strategy=strategy, bitmaps=mode))
    disk.expect(disk.after(plan))
    has(disk.active, {"old": CARRIED["old"]} if mode == "carry" and where != "mon" else {})
    assert (where, "b") in {(e.image.stem, e.name) for e in plan.groups[0].bitmaps.lost}


@pytest.mark.parametrize("strategy", ["auto", "pull"])
def test_trees(tmp_path: Path, strategy: str) -> None:
    """Two clones of tue: each has its own union, read where the other one inherits."""
    disk = week(tmp_path / "d")
    other = disk.directory / "thu.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "tue.qcow2", "-F", "qcow2", other)
    qemu_img("bitmap", "--add", "--enable", "-g", "4k", other, "b")
    write(other, [(6 * M, 512)])
    disk.points[other.name] = raw_of(other)
    with open_tree([disk.active, other]) as tree:
        options = MergeOptions(strategy=strategy, bitmaps="carry")
        plan = make_plan(tree, Request(drop=DROP), options)
        assert not plan.refusals
        execute(plan, tree)
    disk.expect({name: name for name in ("base.qcow2", "wed.qcow2", "thu.qcow2")})
    has(disk.active, CARRIED)
    ranges = [*marked(("mon", "tue"), "b"), (6 * M, 4096)]
    has(other, {"b": (4096, True, ranges), "old": CARRIED["old"]})


@pytest.mark.parametrize("strategy", ["pull", "commit", "both"])
def test_the_commands_do_it_by_hand(tmp_path: Path, strategy: str) -> None:
    disk = week(tmp_path / "d")
    with open_chain(disk.active) as chain:
        options = MergeOptions(strategy=strategy, bitmaps="carry")
        plan = make_plan(chain, Request(drop=DROP), options)
    lines = [line for step in plan.steps if (line := shell_line(step)) is not None]
    subprocess.run(["sh", "-eu", "-c", "\n".join(lines)], check=True, capture_output=True)
    disk.expect(disk.after(plan), complete=False)
    has(disk.active, CARRIED)


def test_names_that_look_like_options(tmp_path: Path) -> None:
    odd = {name: (K64, True, [(n * M, 512)]) for n, name in enumerate(("-f", "-u", "--add", "ä b"))}
    layers = {"base": Marked(), "mon": Marked(odd), "wed": Marked(odd)}
    disk = week(tmp_path / "d", layers)
    disk.merge(("mon.qcow2",), MergeOptions(strategy="commit", bitmaps="carry"))
    has(disk.active, {n: (g, a, r) for n, (g, a, r) in odd.items()} | {
        # Each of those made before records the writes for the next.
        name: (K64, True, [w for later in list(odd)[at:] for w in odd[later][2]])
        for at, name in enumerate(odd)
    })  # fmt: skip


# --- refused, or another way ---------------------------------------------------------------


def refusals(disk: Disk, **options: str) -> tuple[Plan, str]:
    plan = disk.plan(Request(drop=DROP), MergeOptions(**options))  # type: ignore[arg-type]
    return plan, "\n".join(plan.refusals)


def test_refused_unless_it_is_said_what_becomes_of_them(tmp_path: Path) -> None:
    disk = week(tmp_path / "d")
    for strategy in ("auto", "pull", "commit"):
        _, said = refusals(disk, strategy=strategy)
        assert "mon.qcow2: holds bitmaps that would be lost; --bitmaps carry" in said
        assert "tue.qcow2: holds bitmaps" in said and "--bitmaps drop" in said
    run("merge", disk.active, "--collapse", "--bitmaps", "lose", "--yes").fails(2)


def test_one_that_would_seem_to_continue_another(tmp_path: Path) -> None:
    layers = {**WEEK, "mon": Marked({}, [(0, 512)]), "tue": Marked()}
    _, said = refusals(week(tmp_path / "d", layers), strategy="pull")
    assert "wed.qcow2: its bitmap 'b' would seem to continue that of base.qcow2" in said


def test_a_target_that_holds_no_bitmaps(tmp_path: Path) -> None:
    layers = {**WEEK, "mon": Marked({}, [(M, 512)], "compat=0.10"), "tue": Marked()}
    layers = {**layers, "base": Marked()}
    disk = week(tmp_path / "d", layers)
    plan, said = refusals(disk, strategy="commit", bitmaps="carry")
    assert "mon.qcow2 has compat 0.10, which holds no bitmaps" in said
    plan, said = refusals(disk, bitmaps="carry")
    assert not said and plan.groups[0].chosen is not None
    assert plan.groups[0].chosen.target != 2
    raw = disk.directory / "base.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", disk.paths[0], raw)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "base.raw", "-F", "raw", disk.paths[1])
    asked = MergeOptions(strategy="commit", bitmaps="carry", allow_format_change=True)
    plan = disk.plan(Request(flatten=True), asked)
    assert "base.raw is raw, which holds no bitmaps" in "\n".join(plan.refusals)
    assert not disk.plan(Request(flatten=True), MergeOptions(bitmaps="carry")).refusals


def test_bitmaps_of_disks_of_different_lengths(tmp_path: Path) -> None:
    disk = week(tmp_path / "d")
    qemu_img("resize", "-q", disk.active, str(SIZE + M))
    _, said = refusals(disk, bitmaps="carry")
    assert "qemu merges only bitmaps of one size" in said
    assert refusals(disk, bitmaps="drop")[1] == ""


def test_a_directory_that_cannot_be_read(tmp_path: Path) -> None:
    disk = week(tmp_path / "d")
    with (disk.directory / "mon.qcow2").open("r+b") as file:
        head = file.read(4096)
        file.seek(head.index(b"\x23\x85\x28\x75") + 24)
        file.write((1 << 40).to_bytes(8, "big"))
    for mode in ("carry", "drop"):
        assert "its bitmaps cannot be read" in refusals(disk, bitmaps=mode)[1]


def test_told_beforehand(tmp_path: Path) -> None:
    disk = week(tmp_path / "d")
    words = [disk.active, "--drop", "mon.qcow2", "--drop", "tue.qcow2"]
    shown = run("plan", *words, "--bitmaps", "carry")
    assert "b, old carried over" in shown.out or "old, b carried over" in shown.out
    shown = run("plan", *words, "--bitmaps", "drop")
    assert "loses" in shown.out and "the bitmap old of mon.qcow2" in shown.out
    group = run("plan", *words, "--bitmaps", "drop", "--json").json["groups"][0]
    assert group["bitmaps"]["mode"] == "drop" and len(group["bitmaps"]["lost"]) == 4
    done = run(
        "commit", disk.active, "--base", "mon.qcow2", "--bitmaps", "carry", "--yes", "--json"
    )
    assert sorted(done.json["groups"][0]["bitmaps"]["carried"]) == ["b", "old"]
    has(disk.directory / "mon.qcow2", CARRIED)


# --- killed ---------------------------------------------------------------------------------


def usable(path: Path, name: str = "b") -> bool:
    found = qemu_info(path)["format-specific"]["data"].get("bitmaps", [])
    return any(each["name"] == name and "in-use" not in each["flags"] for each in found)


@pytest.mark.parametrize("mode", ["carry", "drop"])
@pytest.mark.parametrize(("strategy", "names"), WAYS)
def test_killed_between_steps(tmp_path: Path, mode: str, strategy: str, names: str) -> None:
    options = MergeOptions(strategy=strategy, names=names, bitmaps=mode)
    number, count, exact, marked_more = len(names + mode) % STRIDE, 1000, 0, 0
    while number < count:
        disk = week(tmp_path / str(number))
        plan = stopped(disk, DROP, options, lambda n, _step, number=number: n == number)
        count = len(plan.steps)
        result = plan.groups[0].result
        assert result is not None
        if (
            strategy != "pull"
            and disk.active.exists()
            and disk.directory.joinpath("mon.qcow2").exists()
        ):
            # Either the kept image itself, or the result under its name.
            own = WEEK["wed"].bitmaps["b"][2]
            assert mode == "drop" or covers(exported(disk.active, "b"), own), number
        (done,) = recover(journals_at(disk.directory))
        assert done.outcome == "finished"
        disk.expect(disk.after(plan))
        if mode == "carry" and strategy == "pull":
            # Between a write and its flush nothing tells qemu-img from a guest: then all that
            # the kept image holds is marked, and no more.
            assert qemu_info(result)["format-specific"]["data"]["bitmaps"]
            found = exported(result, "b")
            assert covers(found, CARRIED["b"][2]) and covers(WRITTEN, found)
            exact += found == expected(CARRIED["b"][2], K64, SIZE)
            marked_more += found != expected(CARRIED["b"][2], K64, SIZE)
            assert exported(result, "old") == CARRIED["old"][2]
        else:
            has(result, CARRIED if mode == "carry" else {})
        number += STRIDE
    if mode == "carry" and strategy == "pull":
        assert exact > 2 * marked_more


@pytest.mark.parametrize("strategy", ["pull", "commit", "both"])
def test_killed_and_put_back(tmp_path: Path, strategy: str) -> None:
    """The kept image has its bitmap again, which may mark more than it did."""
    options = MergeOptions(strategy=strategy, bitmaps="carry")
    number, count = 0, 1
    while number < count:
        disk = week(tmp_path / str(number))
        plan = stopped(disk, DROP, options, lambda n, _step, number=number: n == number)
        count = len(plan.steps)
        try:
            recover(journals_at(disk.directory), back=True, give_up_dropped=True)
        except Refused:
            break  # too late for that
        disk.expect({path.name: path.name for path in (disk.paths[0], disk.active)}, complete=False)
        assert not list(disk.directory.glob(".qchain*"))
        assert usable(disk.active)
        assert covers(exported(disk.active, "b"), WEEK["wed"].bitmaps["b"][2])
        number += STRIDE
    assert number > 10


def killer(directory: Path, verb: str, when: int, writes: int) -> Path:
    """A qemu-img that is killed in its `when`th `verb`, at its `writes`th write, and its caller.

    Where it comes to fewer writes, it is over by then.
    """
    program = directory / "qemu-img"
    seen = directory / "seen"
    program.write_text(
        f'#!/bin/sh\nif [ "$1" = {verb} ]; then echo x >> {seen}; '
        f"if [ $(wc -l < {seen}) = {when} ]; then\n"
        f"strace -f -o /dev/null -e inject=pwrite64:signal=KILL:when={writes} "
        'qemu-img "$@"\nkill -9 $PPID; exit 1; fi; fi\nexec qemu-img "$@"\n'
    )
    program.chmod(0o755)
    return program


WITHIN = [
    *(("pull", verb, n) for verb, n in (("rebase", 1), ("rebase", 2), ("bitmap", 2))),
    *(("pull", verb, n) for verb, n in (("bitmap", 5), ("bitmap", 6))),
    *(("commit", verb, n) for verb, n in (("commit", 1), ("bitmap", 5), ("bitmap", 8))),
    *(("both", verb, n) for verb, n in (("commit", 1), ("rebase", 1), ("rebase", 2))),
    ("both", "bitmap", 7),
]
"""The bitmap commands: four save; two (commit), one (both) prune; two place."""


def stopped_within(disk: Disk, options: MergeOptions, program: Path) -> Plan:
    """Merge in a child, which `program` kills; it may come to its end too."""
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=DROP), options)
        assert not plan.refusals, plan.refusals
        child = os.fork()
        if child == 0:
            try:
                execute(plan, chain, QemuImg(program))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    time.sleep(0.3)  # what qemu-img holds for qchain ends with it
    return plan


@needs_strace
@pytest.mark.parametrize("guest", [False, True], ids=["alone", "guest"])
@pytest.mark.parametrize("back", [False, True], ids=["on", "back"])
@pytest.mark.parametrize(("strategy", "verb", "when"), WITHIN)
def test_killed_within_qemu_img(
    tmp_path: Path, strategy: str, verb: str, when: int, back: bool, guest: bool
) -> None:
    """Nothing that was marked is lost, nor what a guest wrote before anybody mended it."""
    options = MergeOptions(strategy=strategy, bitmaps="carry")
    killed = 0
    for writes in (1, 2, 4, 7) if TORTURE else (1, 4):
        disk = week(tmp_path / str(writes))
        program = killer(tmp_path, verb, when, writes)
        plan = stopped_within(disk, options, program)
        (tmp_path / "seen").unlink()
        if not list(disk.directory.glob(".qchain*")):
            continue  # it came to its end
        killed += 1
        assert strategy == "pull" or usable(disk.active)
        content = disk.points[disk.active.name]
        wanted = CARRIED["b"][2] if not back else WEEK["wed"].bitmaps["b"][2]
        if guest:
            run_guest(disk.active)
            content, wanted = raw_of(disk.active), [*wanted, GUEST]
        try:
            recover(journals_at(disk.directory), back=back, give_up_dropped=True)
        except FailedMidway:
            # Pulled into, it is the target itself: its writers cannot be told apart.
            assert guest and strategy == "pull"
            wanted = [*WEEK["wed"].bitmaps["b"][2], GUEST]
        assert not list(disk.directory.glob(".qchain*"))
        assert raw_of(disk.active) == content
        assert qemu_check(disk.active)["corruptions"] == 0
        assert usable(disk.active)
        assert covers(exported(disk.active, "b"), expected(wanted, 1, SIZE))
        if not back and not guest and strategy != "pull":
            has(disk.active, CARRIED)
        assert plan.groups[0].result == disk.active
    assert killed


@pytest.mark.parametrize("strategy", ["pull", "commit", "both"])
def test_a_guest_wrote_meanwhile(tmp_path: Path, strategy: str) -> None:
    """Stopped before any step: what it wrote is marked afterwards."""
    options = MergeOptions(strategy=strategy, bitmaps="carry")
    number, count, failed = 1, 1000, 0
    while number < count:
        disk = week(tmp_path / str(number))
        plan = stopped(disk, DROP, options, lambda n, _step, number=number: n == number)
        count = len(plan.steps)
        run_guest(disk.active)
        content = raw_of(disk.active)
        wanted = [*CARRIED["b"][2], GUEST]
        try:
            recover(journals_at(disk.directory))
        except FailedMidway:
            assert strategy == "pull"
            failed += 1
            wanted = [*WEEK["wed"].bitmaps["b"][2], GUEST]
        assert raw_of(disk.active) == content, number
        assert not list(disk.directory.glob(".qchain*"))
        assert usable(disk.active)
        assert covers(exported(disk.active, "b"), expected(wanted, 1, SIZE)), number
        number += STRIDE
    assert failed < count / STRIDE / 2


def test_a_bitmap_made_meanwhile_is_not_lost(tmp_path: Path) -> None:
    for mode, layers in (("carry", WEEK), ("refuse", {name: Marked() for name in WEEK})):
        disk = week(tmp_path / mode, layers)
        options = MergeOptions(strategy="commit", bitmaps=mode)
        stopped(disk, DROP, options, lambda _n, step: isinstance(step, Rename))
        qemu_img("bitmap", "--add", disk.active, "checkpoint")
        with pytest.raises(Refused, match="bitmap"):
            recover(journals_at(disk.directory))
        assert usable(disk.active, "checkpoint")
        qemu_img("bitmap", "--remove", disk.active, "checkpoint")
        assert recover(journals_at(disk.directory))[0].outcome == "finished"


def test_a_failure_gives_the_bitmaps_back(tmp_path: Path) -> None:
    """qemu-img loses the result's bitmaps and says that all is well."""
    for strategy in ("pull", "commit", "both"):
        disk = week(tmp_path / strategy)
        program = tmp_path / f"{strategy}.sh"
        program.write_text(
            '#!/bin/sh\nqemu-img "$@" || exit\ncase "$*" in bitmap*image-opts*--add*) '
            'for last; do :; done; [ "$last" = b ] && '
            "qemu-img bitmap --image-opts --clear driver=qcow2,file.locking=off,"
            f"file.filename={disk.directory}/${{T}}.qcow2 b; esac; exit 0\n".replace(
                "${T}", {"pull": "wed", "commit": "mon", "both": "tue"}[strategy]
            )
        )
        program.chmod(0o755)
        before = exported(disk.active, "b")
        with pytest.raises(FailedMidway, match="its bitmap 'b' is not what it should be"):
            disk.merge(
                DROP, MergeOptions(strategy=strategy, bitmaps="carry"), qemu=QemuImg(program)
            )
        assert raw_of(disk.active) == disk.points["wed.qcow2"]
        assert usable(disk.active)
        if strategy != "pull":
            assert exported(disk.active, "b") == before
        assert not list(disk.directory.glob(".qchain*"))


@pytest.mark.parametrize(
    ("what", "to"),
    [("base.qcow2", "image"), ("/etc/passwd", "source"), ("--object", "word")],
)
def test_a_journal_cannot_reach_further(tmp_path: Path, what: str, to: str) -> None:
    disk = week(tmp_path / "d")
    options = MergeOptions(strategy="commit", bitmaps="carry")
    stopped(disk, DROP, options, lambda _n, step: isinstance(step, Rename))
    journal = the_journal(disk.directory)
    document = json.loads(journal.read_bytes())
    step = next(s for s in document["groups"][0]["steps"] if s.get("label") == "carry bitmap b")
    if to == "image":
        step["argv"][-2] = str(disk.directory / what)
        step["writes"] = [step["argv"][-2]]
    elif to == "source":
        step["argv"][step["argv"].index("-b") + 1] = what
    else:
        step["argv"].insert(1, what)
    journal.write_text(json.dumps(document))
    with pytest.raises(Refused, match="no merge of these images has"):
        recover([journal])


# --- the file of saved bitmaps, when it is written anew ----------------------------------------


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sectors=st.integers(1, 1 << 30),
    granularity=st.integers(9, 31),
    auto=st.booleans(),
    writes=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1 << 24)), max_size=12),
)
def test_a_file_of_bitmaps(
    sectors: int, granularity: int, auto: bool, writes: list[tuple[float, int]]
) -> None:
    size = sectors * 512
    unit = 1 << granularity
    spans = sorted((int(at * (size - 1)), length) for at, length in writes)
    spans = [(start, min(length, size - start)) for start, length in spans]
    wanted = expected(spans, unit, size)
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "a.qcow2"
        with image.open("w+b") as file:
            halves = union([spans[::2], spans[1::2]], unit, size)
            everything = NewBitmap("all", 1 << 31, True, [(0, size)])
            write_bitmaps(file, size, [NewBitmap("b", unit, auto, halves), everything])
        assert qemu_check(image) == {"corruptions": 0, "leaks": 0}
        info = qemu_info(image)
        assert info["virtual-size"] == size
        told = info["format-specific"]["data"]["bitmaps"][0]
        assert told == {"name": "b", "granularity": unit, "flags": ["auto"] if auto else []}
        assert exported(image, "b") == wanted
        assert exported(image, "all") == [(0, size)]


def test_a_bitmap_of_ones(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    size = 1 << 30
    with image.open("w+b") as file:
        write_bitmaps(file, size, [NewBitmap("b", 512, True, [(512, size - 512)])])
    assert qemu_check(image) == {"corruptions": 0, "leaks": 0}
    assert exported(image, "b") == [(512, size - 512)]
    assert image.stat().st_size < 1 << 20
