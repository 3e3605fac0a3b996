"""A rebase that is stopped: the image reads as before at every step, and `recover` ends it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_runner import run
from merging import Disk, build, format_of
from stopping import killed
from test_cli_rebase import LINES, NAMES, contents, copy_of, differing, led
from test_merge_killed import CALLS, WRAPPER, cannot_trace, in_a_child

from fixtures.oracle import qemu_check, qemu_img, qemu_info, qemu_io, raw_of
from qchain.chain.chain_tree import open_pair
from qchain.chain.gate import Gate
from qchain.errors import FailedMidway, Refused
from qchain.plan.rebase import Rebase, plan_rebase
from qchain.plan.steps import Command, Compare, Step
from qchain.run.execute import execute
from qchain.run.qemu_img import QemuImg
from qchain.run.recover import journals_at, recover

K = 1024


@dataclass(frozen=True)
class Case:
    """`other` makes the image that is to be led to; `image` is what is led, by its place."""

    name: str
    other: Callable[[Disk, Path], Path]
    image: int = 2
    identical: bool = False


CASES = [
    Case("same", lambda disk, away: copy_of(disk.paths[1], away / "other"), identical=True),
    Case("raw", lambda disk, away: differing(disk, away / "other", "raw")),
    Case("beside", lambda disk, _: differing(disk, disk.directory / "other")),
    Case("own", lambda disk, _: disk.paths[0]),
    Case("sibling", lambda disk, _: sibling(disk)),
    # It had no backing file: what the header goes back to is none.
    Case("base", lambda disk, away: differing(disk, away / "other", "raw"), image=0),
]


def sibling(disk: Disk) -> Path:
    """An image over the same base, with other data than mid."""
    path = disk.directory / "sibling"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path)
    qemu_io(path, ["write -q -P 3 64k 32k", "write -q -P 3 320k 32k"], "qcow2")
    return path


def made(tmp_path: Path, case: Case) -> tuple[Disk, Path, Path]:
    """The disk, the image, the other one; the base has something to show through."""
    disk = build(tmp_path / "d", ["128k:A 128k:- 256k:A", *LINES[1:]], NAMES)
    return disk, disk.paths[case.image], case.other(disk, tmp_path / "e")


def stopped(image: Path, other: Path, when: Callable[[int, Step], bool]) -> Rebase:
    """Rebase in a child that is killed before the first step for which `when` holds."""
    tree, place = open_pair(image, other, Gate(follow=True))
    with tree:
        rebase = plan_rebase(tree, place, allow_copy=True)
        assert rebase.plan.steps, rebase.plan.refusals
        killed(rebase.plan, tree, when)
    return rebase


def reads_as_before(disk: Disk) -> None:
    for path in disk.paths:
        assert raw_of(path) == disk.points[path.name], path.name


def unnamed(image: Path) -> str | None:
    """The backing name in the header."""
    return qemu_info(image).get("backing-filename")


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_killed_before_every_step(tmp_path: Path, case: Case, back: bool) -> None:
    stride = 1 if "QCHAIN_TORTURE" in os.environ or case.identical else 3
    number, count = 0 if case.identical else CASES.index(case) % stride, None
    while count is None or number < count:
        place = tmp_path / str(number)
        place.mkdir()
        disk, image, other = made(place, case)
        was, names, untouched = unnamed(image), sorted(contents(disk.directory)), other.read_bytes()

        def when(n: int, _: Step, number: int = number) -> bool:
            return n == number

        rebase = stopped(image, other, when)
        assert rebase.identical == case.identical
        count = len(rebase.plan.steps)
        reads_as_before(disk)
        # Until it is over nobody else begins.
        assert "not finished" in run("rebase", image, "--onto", other, "--yes", "--follow").fails(3)
        (done,) = recover(journals_at(disk.directory), back=back)
        assert done.outcome == ("put back" if back else "finished")
        assert not journals_at(disk.directory)
        assert sorted(contents(disk.directory)) == names and other.read_bytes() == untouched
        reads_as_before(disk)
        if back:
            assert unnamed(image) == was
            assert qemu_check(image) == {"corruptions": 0, "leaks": 0}
            again = ("--yes", "--allow-copy", "--follow")
            assert run("rebase", image, "--onto", other, *again).code == 0
            reads_as_before(disk)
        assert Path(image.parent, unnamed(image) or "").samefile(other)
        assert qemu_info(image)["backing-filename-format"] == format_of(other)
        number += stride


@pytest.mark.skipif(cannot_trace(), reason="needs strace")
@pytest.mark.parametrize("together", [True, False], ids=["both", "qemu-img"])
@pytest.mark.parametrize(
    ("case", "kind"),
    [(CASES[0], "rebase-u"), (CASES[1], "rebase"), (CASES[-1], "rebase"), (CASES[-1], "rebase-u")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_killed_within_qemu_img(tmp_path: Path, case: Case, kind: str, together: bool) -> None:
    """At its system calls; `both`: qchain dies in the same moment, and cannot put back."""
    killed = 0
    for number, (call, nth) in enumerate(CALLS):
        place = tmp_path / str(number)
        place.mkdir()
        disk, image, other = made(place, case)
        names = sorted(contents(disk.directory))
        wrapper, mark = place / "qemu-img", place / "mark"
        otherwise = "kill -9 $PPID" if together else "true"
        words = {"kind": kind, "mark": mark, "call": call, "nth": nth, "otherwise": otherwise}
        wrapper.write_text(WRAPPER.format(**words))
        wrapper.chmod(0o755)
        tree, at = open_pair(image, other, Gate(follow=True))
        with tree:
            plan = plan_rebase(tree, at, allow_copy=True).plan
            in_a_child(lambda: execute(plan, tree, QemuImg(wrapper)) and None)  # noqa: B023
        assert mark.exists(), f"no {kind} in this rebase"
        reads_as_before(disk)
        journals = journals_at(disk.directory)
        killed += bool(journals)
        back = bool(number % 2)
        for done in recover(journals, back=back):
            assert done.outcome == ("put back" if back else "finished")
        assert sorted(contents(disk.directory)) == names
        reads_as_before(disk)
        assert qemu_check(image)["corruptions"] == 0
    assert killed >= 2 or not together, "the injection did not work: nothing was proven"


def pulled(_number: int, step: Step) -> bool:
    return isinstance(step, Compare)


def pointing(_number: int, step: Step) -> bool:
    """Before the header alone changes."""
    return isinstance(step, Command) and step.argv[:2] == ("rebase", "-u")


@pytest.mark.parametrize("when", [pulled, pointing])
@pytest.mark.parametrize("which", ["other", "mid.qcow2"])
def test_what_was_proven_is_proven_no_more(
    tmp_path: Path, when: Callable[[int, Step], bool], which: str
) -> None:
    """Between the stop and the recovery somebody writes to one of the two chains."""
    disk, image, other = made(tmp_path, CASES[2])
    stopped(image, other, when)
    spoilt = disk.directory / which
    qemu_io(spoilt, [f"write -q -P 5 {448 * K} 64k"], "qcow2")
    before = contents(disk.directory)
    with pytest.raises(Refused, match="has changed since the rebase was stopped"):
        recover(journals_at(disk.directory))
    assert contents(disk.directory) == before
    (done,) = recover(journals_at(disk.directory), back=True)
    assert done.outcome == "put back" and unnamed(image) == "mid.qcow2"
    if which == "other":
        reads_as_before(disk)


def test_only_the_header_and_the_other_one_has_changed(tmp_path: Path) -> None:
    disk, image, other = made(tmp_path, CASES[0])
    stopped(image, other, pointing)
    qemu_io(other, [f"write -q -P 5 {448 * K} 64k"], "qcow2")
    with pytest.raises(Refused, match="has changed since the rebase was stopped"):
        recover(journals_at(disk.directory))
    assert run("recover", disk.directory, "--back").code == 0
    reads_as_before(disk)


def test_a_guest_ran_meanwhile(tmp_path: Path) -> None:
    """What it wrote to the image after the stop stays, whichever chain it is led to."""
    disk, image, other = made(tmp_path, CASES[2])
    stopped(image, other, pointing)
    qemu_io(image, [f"write -q -P 5 {300 * K} 8k"], "qcow2")
    said = raw_of(image)
    (done,) = recover(journals_at(disk.directory))
    assert done.outcome == "finished" and raw_of(image) == said
    led(image, "other", "qcow2")


class Lazy(QemuImg):
    """A qemu-img that claims to have pulled and has not, or to have written the header."""

    def __init__(self, verb: tuple[str, ...]) -> None:
        super().__init__()
        self.verb = verb

    def run(self, argv, *args, **kwargs):  # type: ignore[no-untyped-def]
        if tuple(argv[: len(self.verb)]) != self.verb:
            super().run(argv, *args, **kwargs)


@pytest.mark.parametrize("verb", [("rebase", "-p"), ("rebase", "-u")])
def test_an_exit_code_is_no_evidence(tmp_path: Path, verb: tuple[str, ...]) -> None:
    disk, image, other = made(tmp_path, CASES[1])
    before = sorted(contents(disk.directory))
    tree, place = open_pair(image, other, Gate(follow=True))
    with tree:
        plan = plan_rebase(tree, place, allow_copy=True).plan
        with pytest.raises(FailedMidway):
            execute(plan, tree, Lazy(verb))
    reads_as_before(disk)
    if verb[1] == "-p":
        assert unnamed(image) == "mid.qcow2" and sorted(contents(disk.directory)) == before
    else:
        # It cannot be put back either: there is somebody to do it later.
        assert recover(journals_at(disk.directory))[0].outcome == "finished"
        assert Path(image.parent, unnamed(image) or "").samefile(other)
    reads_as_before(disk)


def test_something_comes_between_plan_and_work(tmp_path: Path) -> None:
    disk, image, other = made(tmp_path, CASES[0])
    tree, place = open_pair(image, other, Gate(follow=True))
    with tree:
        rebase = plan_rebase(tree, place)
        qemu_io(other, ["write -q -P 5 448k 64k"], "qcow2")
        with pytest.raises(Refused, match="has changed"):
            execute(rebase.plan, tree)
    assert unnamed(image) == "mid.qcow2"
    reads_as_before(disk)
