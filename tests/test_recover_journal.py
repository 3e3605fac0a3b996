"""Which journals are believed, where they are found, and who may act on one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import run
from merging import Disk, build
from stopping import LINES, deleting, renaming, stopped, the_journal

from fixtures.build import build_layer
from fixtures.language import parse_layer
from fixtures.oracle import raw_of
from qchain.chain.chain import open_chain
from qchain.chain.gate import Gate
from qchain.errors import ImageError, Refused
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Command, Rename, Step
from qchain.run import journal_file
from qchain.run.execute import execute
from qchain.run.journal_file import read_journal
from qchain.run.locking import sole
from qchain.run.recover import journals_at, recover
from qchain.run.survey import open_files

BOTH = ("base.qcow2", "l1.qcow2")
K = 1024


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return build(tmp_path / "d", LINES)


def everything(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.lstat().st_ino, path.read_bytes() if path.is_file() else b"")
        for path in sorted(directory.rglob("*"))
    }


def edited(journal: Path, change: Callable[[Any], None]) -> None:
    stored = json.loads(journal.read_bytes())
    change(stored)
    journal.write_text(json.dumps(stored))


# --- who wrote it -----------------------------------------------------------------------


def test_it_says_what_every_file_was(disk: Disk) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="both"), renaming)
    journal = the_journal(disk.directory)
    assert journal.stat().st_mode & 0o777 == 0o600
    stored = json.loads(journal.read_bytes())
    assert stored["qchain_journal"] == 3 and stored["unsettled"] == []
    for layer, path in zip(stored["layers"], reversed(disk.paths), strict=True):
        status = path.stat()
        assert layer["path"] == str(path)
        assert (layer["device"], layer["inode"]) == (status.st_dev, status.st_ino)
        assert (layer["size"], layer["mtime_ns"]) == (status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_others_can_write_to_it(disk: Disk, mode: int) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), deleting)
    the_journal(disk.directory).chmod(mode)
    before = everything(disk.directory)
    with pytest.raises(Refused, match="others than its owner can write"):
        recover(journals_at(disk.directory))
    assert everything(disk.directory) == before


def test_it_belongs_to_somebody_else(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), deleting)
    journal = the_journal(disk.directory)
    if os.geteuid() == 0:
        os.chown(journal, 65534, -1)
    else:
        monkeypatch.setattr(journal_file.os, "geteuid", lambda: 65534)
    before = everything(disk.directory)
    with pytest.raises(Refused, match="belongs to another user"):
        recover(journals_at(disk.directory))
    assert everything(disk.directory) == before
    assert "belongs to another user" in run("recover", disk.directory).fails(3)


def test_it_is_a_link(disk: Disk, tmp_path: Path) -> None:
    stopped(disk, BOTH, MergeOptions(strategy="commit"), deleting)
    journal = the_journal(disk.directory)
    journal.rename(tmp_path / "away")
    journal.symlink_to(tmp_path / "away")
    before = everything(disk.directory)
    with pytest.raises(Refused, match="symbolic link"):
        recover(journals_at(disk.directory))
    assert everything(disk.directory) == before


# --- what it may make us do -------------------------------------------------------------


def hostile_steps(disk: Disk, victim: Path) -> list[dict[str, Any]]:
    image, mine = str(disk.active), str(disk.directory / ".qchain-x")
    command = {"step": "Command", "cwd": None, "weight": 0, "label": "", "commits": False}
    return [
        {"step": "Unlink", "path": str(victim)},
        {"step": "Unlink", "path": f"{mine}/../../victim"},
        {"step": "Unlink", "path": f"{disk.directory}/../victim"},
        {"step": "Rename", "old": str(victim), "new": image},
        {"step": "Rename", "old": image, "new": str(victim)},
        {"step": "SymbolicLink", "target": str(victim), "link": mine},
        {"step": "HardLink", "existing": str(victim), "link": mine},
        {"step": "HardLink", "existing": image, "link": str(victim) + ".2"},
        {"step": "TakeAttributes", "source": image, "target": str(victim)},
        {"step": "Freeze", "image": image, "into": str(victim)},
        {"step": "MakeDirectory", "path": str(victim) + ".d"},
        {"step": "MakeDirectory", "path": f"{mine}.journal"},
        command | {"writes": [], "argv": ["convert", str(victim), f"{mine}.raw"]},
        command | {"writes": [image], "argv": ["rebase", "-u", "-b", "", str(victim)]},
        command | {"writes": [str(victim)], "argv": ["rebase", "-u", "-b", "", str(victim)]},
        command | {"writes": [], "argv": ["create", "-f", "raw", str(victim), "0"]},
        command | {"writes": [image], "argv": ["resize", "-f", "raw", str(victim), "0"]},
        command | {"writes": [image], "argv": ["commit", "-b", str(victim), image]},
        command | {"writes": [image], "argv": []},
        command | {"writes": [image], "argv": [1, 2, 3]},
        command | {"writes": [], "argv": ["create", "-f", "raw", f"{mine}.b", "0"], "cwd": "/"},
        {"step": "Unlink", "path": 7},
        {"step": "Unlink", "path": "relative"},
        {"step": "Unlink"},
        {"step": "Shell", "path": image},
    ]


def test_steps_that_no_merge_has(disk: Disk, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"x" * 512)
    stopped(disk, BOTH, MergeOptions(strategy="commit", verify="none"), deleting)
    journal = the_journal(disk.directory)
    original = journal.read_bytes()
    for step in hostile_steps(disk, victim):
        stored = json.loads(original)
        steps = stored["groups"][0]["steps"]
        # Wherever it stands, even among those that are done.
        for place in (0, stored["step"], len(steps) - 1):
            stored["groups"][0]["steps"] = [*steps[:place], step, *steps[place + 1 :]]
            journal.write_text(json.dumps(stored))
            before = everything(tmp_path)
            with pytest.raises((Refused, ImageError)):
                recover([journal])
            assert everything(tmp_path) == before, step
    journal.write_bytes(original)
    recover([journal])
    disk.expect({"l2.qcow2": "l2.qcow2"})


def put(*keys: Any) -> Callable[[Any], None]:
    *way, last, value = keys

    def change(stored: Any) -> None:
        for key in way:
            stored = stored[key]
        stored[last] = value

    return change


BROKEN: dict[str, Callable[[Any], None]] = {
    "group 9": put("group", 9),
    "group -1": put("group", -1),
    "step 999": put("step", 999),
    "step -1": put("step", -1),
    "step 1.5": put("step", 1.5),
    "step true": put("step", True),
    "no token": lambda stored: stored.pop("token") and None,
    "target": put("groups", 0, "target", 77),
    "line": put("groups", 0, "line", "x"),
    "line of one": put("groups", 0, "line", [0]),
    "line in a circle": put("groups", 0, "line", [0, 1, 0]),
    "line beyond": put("groups", 0, "line", [0, 99]),
    "count": put("groups", 0, "count", 1),
    "count beyond": put("groups", 0, "count", 99),
    "own": put("groups", 0, "own", 0),
    "own beyond": put("groups", 0, "own", 77),
    "actives": put("actives", []),
    "active": put("actives", [99]),
    "present": put("groups", 0, "present", ["a"]),
    "no steps": put("groups", 0, "steps", []),
    "steps": put("groups", 0, "steps", {"0": 1}),
    "step list": put("groups", 0, "steps", 0, []),
    "no groups": put("groups", []),
    "no layers": put("layers", []),
    "layers": put("layers", {"a": 1}),
    "zero byte": put("layers", 0, "path", "/a\0b"),
    "surrogate": put("layers", 0, "path", "/\ud800"),
    "relative": put("layers", 0, "path", "act.qcow2"),
    "format": put("layers", 0, "format", []),
    "vmdk": put("layers", 0, "format", "vmdk"),
    "inode": put("layers", 0, "inode", 1 << 70),
    "mtime": put("layers", 0, "mtime_ns", "now"),
    "digest": put("layers", 0, "digest", None),
    "verify": put("verify", "zzz"),
    "names": put("names", None),
    "scan": put("scan", [1]),
    "unsettled": put("unsettled", [99]),
    "version 1": put("qchain_journal", 1),
    "version 4": put("qchain_journal", 4),
    "see": put("see", "nowhere"),
}


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_broken_ones(disk: Disk, back: bool) -> None:
    """One line, a number of the contract, nothing changed."""
    stopped(disk, BOTH, MergeOptions(strategy="commit"), lambda number, _step: number == 2)
    journal = the_journal(disk.directory)
    original = journal.read_bytes()
    texts = {
        "cut": original[:500].decode(),
        "empty": "",
        "deep": "[" * 100_000,
        "list": "[]",
        "number": "7",
        "infinite": original.decode().replace('"step": 2', '"step": 1e999'),
        "long number": original.decode().replace('"step": 2', '"step": ' + "9" * 5000),
        "not text": "\udcff",
    }
    for name, change in BROKEN.items():
        stored = json.loads(original)
        change(stored)
        texts[name] = json.dumps(stored)
    for name, text in texts.items():
        assert text != original.decode(), name
        journal.write_bytes(text.encode("utf-8", "surrogateescape"))
        before = everything(disk.directory)
        result = run("recover", *(["--back"] if back else []), disk.directory)
        assert str(journal) in result.fails(3 if result.code == 3 else 4), name
        assert everything(disk.directory) == before, name
    journal.write_bytes(original)
    recover([journal], back=back)


# --- where it is found ------------------------------------------------------------------


@pytest.fixture
def spread(tmp_path: Path) -> tuple[Path, Path, bytes]:
    """top in a/, on mid and base in b/; what top reads."""
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    build_layer(b / "base.qcow2", parse_layer(LINES[0]), 256 * K)
    build_layer(b / "mid.qcow2", parse_layer(LINES[1]), 256 * K, ("base.qcow2", "qcow2"))
    build_layer(a / "top.qcow2", parse_layer(LINES[2]), 256 * K, ("../b/mid.qcow2", "qcow2"))
    return a, b, raw_of(a / "top.qcow2")


def stop_spread(a: Path, b: Path, when: Callable[[int, Step], bool]) -> None:
    disk = Disk(a, [b / "base.qcow2", b / "mid.qcow2", a / "top.qcow2"], {})
    stopped(disk, ("mid.qcow2", "base.qcow2"), MergeOptions(strategy="both"), when,
            Gate(allow=(a.parent,)))  # fmt: skip


@pytest.mark.parametrize("where", ["a", "b", "a/top.qcow2", "b/mid.qcow2", "b/base.qcow2"])
def test_images_in_two_directories(spread: tuple[Path, Path, bytes], where: str) -> None:
    a, b, expected = spread
    pulled = False

    def after_the_pull(_number: int, step: Step) -> bool:
        nonlocal pulled
        before, pulled = pulled, isinstance(step, Command) and "--image-opts" in step.argv
        return before

    stop_spread(a, b, after_the_pull)
    for image in (a / "top.qcow2", b / "mid.qcow2"):
        with open_chain(image, Gate(allow=(a.parent,))) as chain:
            plan = make_plan(chain, Request(flatten=True))
        assert any("not finished" in line for line in plan.refusals), image
    assert [each.outcome for each in recover(journals_at(a.parent / where))] == ["finished"]
    assert raw_of(a / "top.qcow2") == expected
    assert [p.name for d in (a, b) for p in d.iterdir()] == ["top.qcow2"]


@pytest.mark.parametrize("number", range(0, 30, 3))
def test_no_pointer_is_left(spread: tuple[Path, Path, bytes], number: int) -> None:
    a, b, expected = spread
    try:
        stop_spread(a, b, lambda n, _step: n == number)
    except AssertionError as error:
        assert "came to its end" in str(error)
    recover(journals_at(b))
    assert raw_of(a / "top.qcow2") == expected
    assert [p.name for d in (a, b) for p in d.iterdir()] == ["top.qcow2"]


def test_a_pointer_that_leads_nowhere(spread: tuple[Path, Path, bytes]) -> None:
    a, b, _ = spread
    stop_spread(a, b, renaming)
    (journal,) = journals_at(a)
    kept = journal.read_bytes()
    journal.unlink()
    with pytest.raises(ImageError, match="leads to the journal"):
        journals_at(b)
    journal.write_bytes(kept)
    journal.chmod(0o600)
    recover(journals_at(b))


# --- written in part ---------------------------------------------------------------------

KILL = """
import os, signal, sys
from qchain.run import durable
old, count = durable.rename_durably, 0
def rename(source, target):
    global count
    if str(source).endswith(".journal.new"):
        if count == {nth}:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    old(source, target)
durable.rename_durably = rename
from qchain_cli.main import main
main(["merge", "--yes", "--drop", "l1.qcow2", {active!r}])
"""


@pytest.mark.parametrize("nth", [0, 1, 5])
@pytest.mark.parametrize("way", ["directory", "image"])
def test_killed_while_it_is_written(disk: Disk, nth: int, way: str) -> None:
    script = KILL.format(nth=nth, active=str(disk.active))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(disk.directory.glob("*.journal.new"))
    result = run("recover", disk.directory if way == "directory" else disk.active)
    assert result.code == 0 and ("Nothing is unfinished" in result.out) == (nth == 0)
    assert not [path.name for path in disk.directory.iterdir() if path.name.startswith(".")]
    assert raw_of(disk.active) == disk.points["l2.qcow2"]


# --- two at once ---------------------------------------------------------------------------


def test_a_merge_is_running(tmp_path: Path) -> None:
    """Between any of its steps, those after the first group has its new name included."""
    disk = build(tmp_path / "d", [*LINES, "256k:-", "64k:- 64k:D 128k:-"])
    renamed = 0
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=("l1.qcow2", "l3.qcow2")),
                         MergeOptions(strategy="commit"))  # fmt: skip
        assert not plan.refusals

        def look(step: Step) -> None:
            nonlocal renamed
            # As if it were about to be written: nobody else may take it away.
            new = the_journal(disk.directory)
            new = new.with_name(f"{new.name}.new")
            new.write_bytes(b"half")
            with pytest.raises(
                Refused,
                match=rf"another qchain is working on this chain: \S+ \(pid {os.getpid()}\)",
            ):
                recover(journals_at(disk.directory))
            assert new.read_bytes() == b"half"
            new.unlink()
            renamed += isinstance(step, Rename)

        execute(plan, chain, before_step=look)
    assert renamed == 2
    disk.expect(disk.after(plan))


def test_a_merge_of_the_chain_was_stopped_after_planning(disk: Disk) -> None:
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=BOTH))
        assert not plan.refusals
        stopped(disk, BOTH, MergeOptions(), lambda number, _step: number == 0)
        before = everything(disk.directory)
        with pytest.raises(Refused, match="not finished"):
            execute(plan, chain)
    assert everything(disk.directory) == before


def test_two_recoveries(disk: Disk) -> None:
    """The second comes while the first is at it, from another process."""
    stopped(disk, BOTH, MergeOptions(strategy="both"), renaming)
    journal = the_journal(disk.directory)
    with open_files(read_journal(journal)) as files, sole(files.values(), files.values()):
        before = everything(disk.directory)
        assert "another qchain" in run("recover", disk.directory).fails(3)
        assert everything(disk.directory) == before
    recover([journal])
    disk.expect({"l2.qcow2": "l2.qcow2"})


def test_chains_that_share_a_base_do_not_wait(disk: Disk) -> None:
    """Two merges of clones at once: what neither merges is nobody's alone."""
    other = disk.directory / "clone.qcow2"
    build_layer(disk.directory / "m.qcow2", parse_layer("64k:M"), 256 * K, ("base.qcow2", "qcow2"))
    build_layer(other, parse_layer("64k:- 64k:N"), 256 * K, ("m.qcow2", "qcow2"))
    expected = raw_of(other)
    done: list[Any] = []
    with open_chain(disk.active) as chain, open_chain(other) as clone:
        plan = make_plan(chain, Request(drop=("l1.qcow2",)))
        second = make_plan(clone, Request(drop=("m.qcow2",)))

        def look(_step: Step) -> None:
            if not done:
                done.append(execute(second, clone))

        execute(plan, chain, before_step=look)
    assert raw_of(other) == expected and raw_of(disk.active) == disk.points["l2.qcow2"]
