"""Work files beside images that are somebody else's: nobody can lead a merge astray with them,
and nobody who may read an image is kept from it."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from merging import Disk, build
from test_merge_refusals import as_ordinary_user

from fixtures.oracle import raw_of
from qchain.chain.chain import open_chain
from qchain.errors import FailedMidway
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Command, Freeze, MakeDirectory, Step, TakeAttributes
from qchain.run import attributes, group
from qchain.run.execute import execute
from qchain.run.qemu_img import QemuImg
from qchain.run.recover import journals_at, recover

LINES = ["256k:A 64k:- 64k:B", "64k:- 128k:C", "64k:D 128k:- 64k:D"]
NAMES = ("base", "mid", "top")
NOBODY = 65534
DROPS = [("mid.qcow2",), ("base.qcow2", "mid.qcow2")]


@pytest.fixture
def disk() -> Iterator[Disk]:
    """Images of another user, in a directory of theirs that all can reach."""
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)
        made = build(Path(temporary) / "images", LINES, NAMES)
        for path in (made.directory, *made.paths):
            if os.getuid() == 0:
                os.chown(path, NOBODY, NOBODY)
        yield made


@pytest.mark.parametrize("drop", DROPS)
def test_the_names_cannot_be_told_from_the_journals(disk: Disk, drop: tuple[str, ...]) -> None:
    seen: set[str] = set()

    def look(step: Step) -> None:
        if isinstance(step, MakeDirectory):
            seen.update(path.name for path in disk.directory.iterdir())

    plan, _ = disk.merge(drop, MergeOptions(strategy="pull"), before_step=look)
    (journal,) = [name for name in seen if name.endswith(".journal")]
    token = journal.removeprefix(".qchain-").removesuffix(".journal")
    work = {step.path.name for step in plan.steps if isinstance(step, MakeDirectory)}
    work |= {step.argv[-2] for step in plan.steps
             if isinstance(step, Command) and step.argv[0] == "create"}  # fmt: skip
    assert work and all(token not in name for name in work)
    assert len(next(iter(work))) >= len(".qchain-") + 16


PLANTED = ["open directory", "link", *(["another's directory"] if os.getuid() == 0 else [])]


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_work_directory(disk: Disk, kind: str) -> None:
    victim = disk.directory.parent / "victim"
    victim.write_text("precious")

    def plant(step: Step) -> None:
        if isinstance(step, MakeDirectory):
            if kind == "link":
                step.path.symlink_to(disk.directory.parent)
                return
            step.path.mkdir(0o700)
            (step.path / "before").symlink_to(victim)
            if kind == "another's directory":
                os.chown(step.path, NOBODY, NOBODY)
            else:
                step.path.chmod(0o770)

    with pytest.raises(FailedMidway, match="was not made by this merge"):
        disk.merge(["mid.qcow2"], before_step=plant)
    assert victim.read_text() == "precious"
    assert raw_of(disk.active) == disk.points["top.qcow2"]


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("name", ["before", "rescued", "alias", "inner alias"])
def test_planted_work_files(disk: Disk, name: str, drop: tuple[str, ...]) -> None:
    """A link to the victim under each name, as late as can be: it is never followed."""
    victim = disk.directory.parent / "victim"
    victim.write_text("precious")
    planted: list[Path] = []

    def plant(step: Step) -> None:
        path = None
        if isinstance(step, Freeze) and name in ("before", "rescued"):
            path = step.into.with_name(name)
        elif isinstance(step, Command) and step.argv[0] == "create" and step.cwd is not None:
            where = step.cwd / step.argv[-2]
            if (where.parent == disk.directory) == (name == "alias"):
                path = where if "alias" in name else None
        if path is not None and not planted:
            path.symlink_to(victim)
            planted.append(path)

    options = MergeOptions(strategy="pull")
    disk.merge(drop, options, before_step=plant)
    assert planted or (name == "inner alias" and "base.qcow2" not in drop)
    assert victim.read_text() == "precious"
    assert raw_of(disk.active) == disk.points["top.qcow2"]
    assert not list(disk.directory.glob(".qchain*"))


@pytest.mark.parametrize("when", ["first", "last"])
def test_work_files_of_ones_own_are_made_again(disk: Disk, when: str) -> None:
    """Killed after an alias was given to the images' owner: `recover` goes on."""
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=("mid.qcow2",)), MergeOptions(strategy="pull"))
        kind = Command if when == "first" else TakeAttributes
        stop = 1 + next(n for n, step in enumerate(plan.steps) if isinstance(step, kind))
        child = os.fork()
        if child == 0:
            seen = 0

            def count(_step: Step) -> None:
                nonlocal seen
                if seen == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

            try:
                execute(plan, chain, before_step=count)
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert recover(journals_at(disk.directory))[0].outcome == "finished"
    disk.expect({"top.qcow2": "top.qcow2", "base.qcow2": "base.qcow2"})


@pytest.mark.parametrize("strategy", ["pull", "both"])
@pytest.mark.parametrize("drop", [("low.qcow2", "mid.qcow2"), ("base.qcow2", "low.qcow2",
                                                               "mid.qcow2")])  # fmt: skip
def test_the_owner_can_read_it_at_every_moment(strategy: str, drop: tuple[str, ...]) -> None:
    """root merges with a strict umask: the guest's user can open what the header names."""
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)
        lines = [LINES[0], "64k:- 64k:L", *LINES[1:]]
        disk = build(Path(temporary) / "images", lines, ("base", "low", "mid", "top"))
        for path in (disk.directory, *disk.paths):
            path.chmod(0o700 if path.is_dir() else 0o600)
            if os.getuid() == 0:
                os.chown(path, NOBODY, NOBODY)
        wrapper = Path(temporary) / "qemu-img"
        # Killed with qchain when the pull has ended: the header names the alias.
        wrapper.write_text(
            '#!/bin/sh\n[ "$1" = rebase ] && [ "$2" != -u ] || exec qemu-img "$@"\n'
            'qemu-img "$@"\nkill -9 $PPID\n'
        )
        wrapper.chmod(0o755)
        with open_chain(disk.active) as chain:
            plan = make_plan(chain, Request(drop=drop), MergeOptions(strategy=strategy))
            child = os.fork()
            if child == 0:
                try:
                    os.umask(0o077)
                    execute(plan, chain, QemuImg(wrapper))
                finally:
                    os._exit(0)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
        alias = next(disk.directory.glob(".qchain-*.b"))
        assert alias.stat().st_uid == disk.active.stat().st_uid
        expected = disk.points["top.qcow2"]
        answer = as_ordinary_user(lambda: [str(raw_of(disk.active) == expected)])
        assert answer == "True", answer
        recover(journals_at(disk.directory))
        assert raw_of(disk.active) == expected


def test_a_copy_is_open_to_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who cannot give it what the kept image has gets no copy, rather than one for all to read.

    (An alias, which holds a name and no data, may be opened to all then.)
    """
    disk = build(tmp_path, ["256k:A", "64k:B", "64k:- 64k:C"])
    disk.active.chmod(0o600)

    def refused(_source: Path, target: Path) -> None:
        raise FailedMidway(target, "cannot set its attributes: operation not permitted")

    monkeypatch.setattr(attributes, "take_attributes", refused)
    monkeypatch.setattr(group, "take_attributes", refused)
    with pytest.raises(FailedMidway, match="not permitted"):
        disk.merge(["l1.qcow2"], MergeOptions(strategy="copy"))
    disk.expect({path.name: path.name for path in disk.paths})
    assert disk.active.stat().st_mode & 0o777 == 0o600
