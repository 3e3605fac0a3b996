"""Readers say that a merge stopped amid its work, and read all the same."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest
from cli_runner import Result, run
from merging import Disk, build

from qchain.chain.chain import open_chain
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Step
from qchain.run.execute import execute

LAYERS = ["[size=1M] 128k:A 64k:-", "64k:- 64k:B", "64k:- 64k:C 64k:D"]


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Disk, Path]:
    """A chain whose merge was killed before its third step, and the journal of it."""
    disk = build(tmp_path / "vm", LAYERS)
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=("l1.qcow2",)), MergeOptions())
        child = os.fork()
        if child == 0:
            steps: list[Step] = []

            def count(step: Step) -> None:
                steps.append(step)
                if len(steps) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                execute(plan, chain, before_step=count)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    (journal,) = disk.directory.glob(".qchain-*.journal")
    return disk, journal


def told(result: Result, journal: Path) -> bool:
    """One line for people, and nothing else on stderr."""
    assert result.code == 0, result.err
    line = f"qchain: {journal}: a merge is not finished; "
    if not result.err:
        return False
    assert result.err.startswith(line) and result.err.count("\n") == 1, result.err
    return True


def test_readers_mention_it(stopped: tuple[Disk, Path]) -> None:
    disk, journal = stopped
    for words in (["info"], ["chain"]):
        for path in disk.paths[1:]:
            assert told(run(*words, path), journal)
            found = run(*words, "--json", path)
            assert found.json["unfinished_merges"] == [str(journal)] and found.err == ""
    for place in (disk.directory, disk.directory.parent):
        assert told(run("tree", place), journal)
        found = run("tree", "--json", place)
        assert found.json["unfinished_merges"] == [str(journal)] and found.err == ""
    # What the guest sees is what it was.
    digest = run("hash", "--json", disk.active).json["digest"]
    assert digest == hashlib.sha256(disk.points[disk.active.name]).hexdigest()


def test_it_does_not_concern_others(stopped: tuple[Disk, Path]) -> None:
    disk, journal = stopped
    other = build(disk.directory.parent / "elsewhere", ["64k:A"]).active
    other = other.rename(disk.directory / "other.qcow2")
    for words in (["info"], ["chain"]):
        assert not told(run(*words, other), journal)
        assert "unfinished_merges" not in run(*words, "--json", other).json


def test_after_recovery_nothing_is_said(stopped: tuple[Disk, Path]) -> None:
    disk, journal = stopped
    assert run("recover", disk.directory).code == 0
    for words in (["info", disk.active], ["chain", disk.active], ["tree", disk.directory]):
        assert not told(run(*words), journal)
        assert "unfinished_merges" not in run(words[0], "--json", words[1]).json


BROKEN = [b"", b"[]", b'{"groups": 5}', b'{"groups": [{"layers": [{"path": []}]}]}', b"[" * 99999]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_journal_that_cannot_be_read_might_concern_it(content: bytes, tmp_path: Path) -> None:
    disk = build(tmp_path, ["64k:A"])
    journal = tmp_path / ".qchain-1.journal"
    journal.write_bytes(content)
    assert told(run("info", disk.active), journal)


def test_what_only_looks_like_a_journal(tmp_path: Path) -> None:
    disk = build(tmp_path, ["64k:A"])
    os.mkfifo(tmp_path / ".qchain-1.journal")
    (tmp_path / ".qchain-2.journal").symlink_to("nowhere")
    (tmp_path / ".qchain-3.journal").mkdir()
    for words in (["info", disk.active], ["chain", disk.active], ["tree", tmp_path]):
        assert run(*words).err == ""
