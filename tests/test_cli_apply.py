"""`qchain apply`: a saved plan is done as `merge` would, and refused if anything has changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import command, run
from merging import Disk, build
from test_trees import CLONES, found_in, grown

from fixtures.oracle import qemu_img, qemu_io, raw_of

LINES = ["256k:A", "64k:- 64k:B 128k:-", "64k:C 192k:-", "192k:- 64k:D"]
DROP = ("--drop", "l1.qcow2", "--drop", "l2.qcow2")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return build(tmp_path / "d", LINES)


@pytest.fixture
def saved(disk: Disk, tmp_path: Path) -> Path:
    assert run("plan", disk.active, *DROP, "-o", tmp_path / "p.json").code == 0
    return tmp_path / "p.json"


def everything(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, mtime and content of all files."""
    out = {}
    for path in sorted(directory.iterdir()):
        status = path.stat()
        out[path.name] = (status.st_ino, status.st_mtime_ns, path.read_bytes())
    return out


def refused(saved: Path, directory: Path, code: int, *more: str) -> str:
    """`apply` ends with `code` and one line, and leaves every file as it was."""
    before = everything(directory)
    line = run("apply", saved, "--yes", *more).fails(code)
    assert everything(directory) == before
    return line


# --- done -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        DROP,
        ("--flatten",),
        ("--collapse", "--strategy", "commit", "--names", "lowest"),
        ("--keep", "base.qcow2", "--keep", "l1.qcow2", "--strategy", "pull", "--keep-files"),
        ("--drop", "l2.qcow2", "--verify", "full", "--names", "target", "--strategy", "commit"),
        ("--drop", "l1.qcow2", "--strategy", "copy"),
    ],
    ids=" ".join,
)
def test_as_merge(disk: Disk, tmp_path: Path, words: tuple[str, ...]) -> None:
    twin = tmp_path / "twin" / "d"
    shutil.copytree(disk.directory, twin)
    saved = tmp_path / "p.json"
    assert run("plan", disk.active, *words, "-o", saved).code == 0
    applied = run("apply", saved, "--yes", "--json")
    assert applied.code == 0, applied.err
    merged = run("merge", twin / disk.active.name, *words, "--yes", "--json")
    assert merged.code == 0, merged.err

    def told(found: Any, where: Path) -> list[tuple[object, ...]]:
        return [
            tuple(str(group[name]).replace(str(where), "") for name in ("kept", "target", "result"))
            for group in found["groups"]
        ]

    assert told(applied.json, disk.directory) == told(merged.json, twin)
    assert applied.json["verified"] == merged.json["verified"]
    names = {path.name for path in twin.iterdir()}
    assert {path.name for path in disk.directory.iterdir()} == names
    for name in names - {f"{path.name}.qchain-old" for path in disk.paths}:
        ours, theirs = disk.directory / name, twin / name
        assert raw_of(ours) == raw_of(theirs), name
        assert disk.backing_of(name) == Disk(twin, [], {}).backing_of(name), name


def test_from_another_directory(disk: Disk, tmp_path: Path) -> None:
    """Names in the plan are whole, wherever it was made."""
    (tmp_path / "e").mkdir()
    made = command(
        "plan", "l3.qcow2", "--drop", "./l1.qcow2", "--drop", "../d/l2.qcow2", "--scan", "../e",
        "-o", "../p.json", cwd=disk.directory,
    )  # fmt: skip
    assert made.code == 0, made.err
    done = command("apply", "../p.json", "--yes", cwd=tmp_path / "e")
    assert done.code == 0, done.err
    disk.expect({"base.qcow2": "base.qcow2", "l3.qcow2": "l3.qcow2"})


def test_several_active_images(tmp_path: Path) -> None:
    clones = grown(tmp_path / "d", CLONES)
    tops = found_in(clones, ("x", "y", "z"))
    saved = tmp_path / "p.json"
    assert run("plan", *tops, "--flatten", "-o", saved).code == 0
    done = run("apply", saved, "--yes", "--json")
    assert done.code == 0 and done.json["verified"]["identical"], done.err
    clones.expect({path.name: path.name for path in tops})


def test_a_tree_with_a_new_clone_is_refused(tmp_path: Path) -> None:
    clones = grown(tmp_path / "d", CLONES)
    saved = tmp_path / "p.json"
    assert run("plan", *found_in(clones, "xyz"), "--flatten", "-o", saved).code == 0
    (low,) = found_in(clones, ("low",))
    new = clones.directory / "w.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", low.name, "-F", "qcow2", new)
    assert "w.qcow2" in refused(saved, clones.directory, 3)


def test_a_dry_run_and_the_question(disk: Disk, saved: Path) -> None:
    before = everything(disk.directory)
    shown = run("apply", saved, "--dry-run")
    assert shown.code == 0 and "qemu-img commit" in shown.out
    assert command("apply", saved).fails(2).endswith("add --yes to merge unasked")
    assert run("apply", saved, "--dry-run", "--json").json["steps"]
    assert everything(disk.directory) == before


def test_options_of_reading(disk: Disk, tmp_path: Path) -> None:
    """A plan opens no gate: what lies elsewhere is allowed anew."""
    away = tmp_path / "away"
    away.mkdir()
    qemu_img("convert", "-f", "qcow2", "-O", "qcow2", disk.paths[0], away / "base.qcow2")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", away / "base.qcow2", "-F", "qcow2", disk.paths[1])
    saved = tmp_path / "p.json"
    assert run("plan", disk.active, *DROP, "--allow", away, "-o", saved).code == 0
    assert "--allow" in refused(saved, disk.directory, 4)
    assert run("apply", saved, "--yes", "--allow", away).code == 0
    assert raw_of(disk.active) == disk.points["l3.qcow2"]


def test_applied_twice(disk: Disk, saved: Path) -> None:
    assert run("apply", saved, "--yes").code == 0
    refused(saved, disk.directory, 3)


# --- the files have changed -----------------------------------------------------------------


def written(path: Path) -> None:
    qemu_io(path, ["write -q -P 7 0 4096"], "qcow2")


def touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def header_alone(path: Path) -> None:
    """As somebody who sets the time back afterwards."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(0x8000)  # of the header cluster, which nothing refers to
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def grown_by(path: Path) -> None:
    status = path.stat()
    with path.open("ab") as file:
        file.write(bytes(65536))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


CHANGES = [written, touched, header_alone, grown_by, replaced]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["base.qcow2", "l1.qcow2", "l3.qcow2"])
def test_a_file_that_has_changed(
    disk: Disk, saved: Path, change: Callable[[Path], None], which: str
) -> None:
    change(disk.directory / which)
    line = refused(saved, disk.directory, 3)
    assert which in line and ("has changed" in line or "another file" in line)


def test_a_file_that_is_missing(disk: Disk, saved: Path) -> None:
    (disk.directory / "l1.qcow2").unlink()
    assert "l1.qcow2" in refused(saved, disk.directory, 4)


def test_the_chain_is_another_one(disk: Disk, saved: Path) -> None:
    copy = disk.directory / "copy.qcow2"
    shutil.copy2(disk.paths[0], copy)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", copy.name, "-F", "qcow2", disk.paths[1])
    assert "has changed" in refused(saved, disk.directory, 3)


@pytest.mark.parametrize("below", ["l1.qcow2", "l2.qcow2"])
def test_a_new_overlay(disk: Disk, saved: Path, below: str) -> None:
    new = disk.directory / "new.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", new)
    line = refused(saved, disk.directory, 3)
    assert "new.qcow2" in line and "backs on" in line


def test_a_new_overlay_where_the_plan_looked(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    saved = tmp_path / "p.json"
    assert run("plan", disk.active, *DROP, "--scan", tmp_path / "e", "-o", saved).code == 0
    new = tmp_path / "e" / "new.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", disk.paths[1], "-F", "qcow2", new)
    assert "new.qcow2" in refused(saved, disk.directory, 3)
    new.unlink()
    new.parent.rmdir()
    assert "to be scanned" in refused(saved, disk.directory, 3)


def test_a_plan_that_was_refused(disk: Disk, tmp_path: Path) -> None:
    os.link(disk.paths[1], tmp_path / "another name")
    saved = tmp_path / "p.json"
    assert run("plan", disk.active, *DROP, "-o", saved).code == 3
    (tmp_path / "another name").unlink()
    assert "hard links" in refused(saved, disk.directory, 3)


# --- the plan has changed -------------------------------------------------------------------


def step_for_another_file(plan: Any) -> None:
    plan["steps"].append({"unlink": "/etc/passwd"})


def another_target(plan: Any) -> None:
    plan["groups"][0]["target"] = plan["files"][0]["path"]


def another_strategy(plan: Any) -> None:
    plan["options"]["strategy"] = "pull" if plan["groups"][0]["chosen"] != "pull" else "commit"


def another_drop(plan: Any) -> None:
    del plan["request"]["drop"][0]


def another_program(plan: Any) -> None:
    plan["program"] = "/bin/evil"


def another_order(plan: Any) -> None:
    plan["steps"].reverse()


def one_token(plan: Any) -> None:
    """Two work directories that are one: each name must stand for the same one throughout."""
    text = json.dumps(plan["steps"])
    start = text.index(".qchain-")
    plan["steps"] = json.loads(text.replace(text[start : start + 24], ".qchain-" + "0" * 16, 1))


@pytest.mark.parametrize(
    "edit",
    [
        step_for_another_file, another_target, another_strategy, another_drop, another_program,
        another_order, one_token,
    ],
)  # fmt: skip
def test_an_edited_plan(disk: Disk, saved: Path, edit: Callable[[Any], None]) -> None:
    plan = json.loads(saved.read_text())
    edit(plan)
    saved.write_text(json.dumps(plan))
    assert "edited" in refused(saved, disk.directory, 3)


def values(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a document."""
    inner = document.items() if isinstance(document, dict) else enumerate(document)
    out = []
    for name, value in inner:
        out.append((*path, name))
        if isinstance(value, (dict, list)):
            out += values(value, (*path, name))
    return out


@pytest.mark.parametrize("what", [None, 7, -1, "", "x\0", "\ud800", [], {}, [[]], True, 1e400])
def test_any_value_may_be_anything(disk: Disk, saved: Path, what: Any) -> None:
    """Refused, or done without harm because it says nothing of what is done."""
    plan = json.loads(saved.read_text())
    harmless = 0
    before = everything(disk.directory)
    for way in values(plan):
        changed = json.loads(json.dumps(plan))
        at = changed
        for name in way[:-1]:
            at = at[name]
        if at[way[-1]] == what and type(at[way[-1]]) is type(what):
            continue
        at[way[-1]] = what
        saved.write_text(json.dumps(changed))
        done = run("apply", saved, "--yes", "--dry-run")
        if done.code == 0:
            harmless += 1
            free = way[0] in ("version", "program", "seconds_from", "scanned") or (
                way[0] == "groups" and way[2:3] != ()
            )
            assert free or way[0] in ("options", "request"), way
        else:
            assert done.code in (2, 3, 4), (way, done.err)
            done.fails(done.code)
    assert everything(disk.directory) == before
    assert harmless < len(values(plan)) // 2


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe", b"[]", b"null", b"{}", b"7", b"QFI\xfb", b'{"groups": [], "steps": []}',
        b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000, b"NaN", b'{"a": 1, "a": 2}',
    ],
)  # fmt: skip
def test_not_a_plan(disk: Disk, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.json").write_bytes(content)
    assert "not a plan" in refused(tmp_path / "p.json", disk.directory, 4)


def test_the_plan_of_before(disk: Disk, saved: Path) -> None:
    """A document of `--json` lacks what is needed to do it again."""
    saved.write_text(json.dumps(run("plan", "--json", disk.active, *DROP).json))
    assert "not a plan" in refused(saved, disk.directory, 4)


@pytest.mark.parametrize("said", [0, 2, "1", None, True, [1]])
def test_another_format(disk: Disk, saved: Path, said: object) -> None:
    plan = json.loads(saved.read_text())
    plan["qchain_plan"] = said
    saved.write_text(json.dumps(plan))
    assert "another version" in refused(saved, disk.directory, 4)


def test_no_file_at_all(disk: Disk, tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none", disk.directory, 4)
    assert "no regular file" in refused(tmp_path, disk.directory, 4)
    os.mkfifo(tmp_path / "fifo")
    assert "no regular file" in refused(tmp_path / "fifo", disk.directory, 4)
    assert "no regular file" in refused(Path("/dev/zero"), disk.directory, 4)
    with (tmp_path / "huge").open("wb") as file:
        file.write(b"{")
        file.truncate(1 << 40)
    assert "longer than" in refused(tmp_path / "huge", disk.directory, 4)
