"""A merge that is done is done, whether or not anybody can be told of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_runner import COMMAND, run
from merging import Disk, build
from test_recover import killed_before

from qchain.chain.chain import open_chain
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.run import execute as executing
from qchain.run.execute import execute
from qchain.run.journal import Journal
from qchain.run.recover import journals_at, recover

LAYERS = ["512k:A 512k:-", "64k:- 256k:B 704k:-", "[cluster=4k] 4k:C 1020k:-"]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return build(tmp_path / "d", LAYERS)


@contextmanager
def nowhere(kind: str) -> Iterator[int]:
    """A descriptor that nothing can be written to: a full disk, or a pipe without a reader."""
    if kind == "full":
        fd = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, fd = os.pipe()
        os.close(reader)
    try:
        yield fd
    finally:
        os.close(fd)


def told_nobody(kind: str, *words: str | Path) -> tuple[int, str]:
    with nowhere(kind) as fd:
        done = subprocess.run(
            [COMMAND, *words], stdin=subprocess.DEVNULL, stdout=fd, stderr=subprocess.PIPE,
            text=True, check=False,
        )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_merge_that_nobody_hears_of(disk: Disk, kind: str) -> None:
    code, err = told_nobody(kind, "merge", "--json", "--yes", "--drop", "l1.qcow2", disk.active)
    assert code == 0, err
    if kind == "full":
        assert err.count("\n") == 1
        assert err.startswith("qchain: output: cannot be written") and "merge is done" in err
    else:
        assert err == ""
    disk.expect({"base.qcow2": "base.qcow2", "l2.qcow2": "l2.qcow2"})


@pytest.mark.parametrize("kind", ["full", "closed"])
@pytest.mark.parametrize("json", [(), ("--json",)])
@pytest.mark.parametrize("unfinished", [True, False])
def test_a_recovery_that_nobody_hears_of(
    disk: Disk, kind: str, json: tuple[str, ...], unfinished: bool
) -> None:
    if unfinished:
        killed_before(disk, ("l1.qcow2",), MergeOptions(strategy="commit"), 5)
    code, err = told_nobody(kind, "recover", *json, disk.directory)
    assert code == 0, err
    assert ("nothing is left to recover" in err) == (kind == "full")
    if unfinished:
        disk.expect({"base.qcow2": "base.qcow2", "l2.qcow2": "l2.qcow2"})


def test_the_same_merge_again_after_a_stop(disk: Disk) -> None:
    """What it names may be gone: it is the stopped merge that is told of."""
    plan = killed_before(disk, ("l1.qcow2",), MergeOptions(strategy="pull"), 10**6)
    assert plan is not None
    other = build(disk.directory / "again", LAYERS)
    steps = len(plan.steps)
    killed_before(other, ("l1.qcow2",), MergeOptions(strategy="pull"), steps - 4)
    said = run("merge", "--yes", "--drop", "l1.qcow2", other.active).fails(3)
    assert "is not finished" in said and "'qchain recover" in said


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_an_interrupt_between_the_steps(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Wherever it comes, the message says how it stands."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    kind, words = {
        "before": ((executing, "_unchanged"), "nothing was changed"),
        "between": ((executing, "_let_go"), "'qchain recover' continues"),
        "after": ((Journal, "remove"), "'qchain recover' continues"),
    }[when]
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=("l1.qcow2",)))
        with monkeypatch.context() as patched:
            patched.setattr(*kind, interrupted)
            with pytest.raises(KeyboardInterrupt, match=words):
                execute(plan, chain)
    recover(journals_at(disk.directory))
    if when == "before":
        disk.expect({path.name: path.name for path in disk.paths})
    else:
        disk.expect({"base.qcow2": "base.qcow2", "l2.qcow2": "l2.qcow2"})
