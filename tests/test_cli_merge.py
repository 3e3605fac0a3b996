"""`qchain plan` and `qchain merge`: what they print, ask, refuse and prove."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cli_runner import COMMAND, command, on_terminal, run
from merging import Disk, build
from qchain_cli.tables import size_text
from stopping import stopped

from fixtures.oracle import raw_of
from qchain.plan.options import MergeOptions
from qchain.plan.steps import Compare

LAYERS = ["512k:A 512k:-", "64k:- 256k:B 704k:-", "[cluster=4k] 4k:C 1020k:-", "128k:D 896k:-"]
CANDIDATE = {
    *("strategy", "engine", "target", "feasible", "reason", "read_bytes", "write_bytes"),
    *("extents", "target_growth_bytes", "peak_extra_bytes", "freed_bytes", "seconds", "exact"),
}
DROP = ("--drop", "l1.qcow2", "--drop", "l2.qcow2")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return build(tmp_path / "d", LAYERS)


def untouched(disk: Disk) -> None:
    disk.expect({path.name: path.name for path in disk.paths})


def test_plan_as_json(disk: Disk) -> None:
    result = run("plan", "--json", *DROP, disk.active)
    assert result.code == 0
    plan = result.json
    assert plan["active"] == [str(disk.active)] and plan["refusals"] == []
    (group,) = plan["groups"]
    assert group["kept"] == str(disk.active)
    assert group["dropped"] == [str(disk.paths[2]), str(disk.paths[1])]
    assert group["new_backing"] == str(disk.paths[0])
    assert group["chosen"] in ("pull", "commit", "both") and group["engine"] == "qemu-img"
    assert all(candidate.keys() >= CANDIDATE for candidate in group["candidates"])
    assert {str(path) for path in disk.paths[1:]} >= {group["target"]}
    kinds = {kind for step in plan["steps"] for kind in step}
    assert {"argv", "rename", "unlink", "compare"} <= kinds
    untouched(disk)


def test_plan_for_a_person(disk: Disk) -> None:
    result = on_terminal("plan", *DROP, disk.active)
    assert max(map(len, result.out.splitlines())) <= 80
    assert "l3.qcow2 -> l2.qcow2 -> l1.qcow2 -> base.qcow2" in result.out
    assert "l3.qcow2 -> base.qcow2" in result.out
    chosen = run("plan", "--json", *DROP, disk.active).json["groups"][0]
    assert " ".join(chosen["why"].split()) in " ".join(result.out.split())
    starred = [line.split() for line in result.out.splitlines() if line.startswith("*")]
    assert [line[1:3] for line in starred] == [[chosen["chosen"], Path(chosen["target"]).name]]


def test_exact_says_what_repeats(tmp_path: Path) -> None:
    """64 of the 128 KiB of l1 are what the base has there: a pull passes over them."""
    disk = build(tmp_path, ["1M:A", "64k:A 64k:B 896k:-", "1M:-"])
    found = {}
    for option in ((), ("--exact",)):
        plan = run("plan", "--json", *option, "--drop", "l1.qcow2", disk.active).json
        for each in plan["groups"][0]["candidates"]:
            if each["target"] is not None:
                found[bool(option), each["strategy"]] = (each["write_bytes"], each["exact"])
    assert found == {
        (False, "pull"): (128 << 10, False),
        (True, "pull"): (64 << 10, True),
        # A commit compares nothing.
        (False, "commit"): (0, True),
        (True, "commit"): (0, True),
    }
    untouched(disk)


def test_saved_plan(disk: Disk, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    shown = run("plan", "--json", "-o", saved, *DROP, disk.active).json
    assert shown.items() <= json.loads(saved.read_text()).items()
    nowhere = tmp_path / "none" / "plan.json"
    assert str(nowhere) in run("plan", "-o", nowhere, *DROP, disk.active).fails(2)


def test_where_the_plan_was_written(disk: Disk, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    for words in (("plan",), ("plan", "--json"), ("merge", "--yes")):
        result = run(*words, "-o", saved, *DROP, disk.active)
        assert result.code == 0 and result.err == f"qchain: plan written to {saved}\n"
        assert json.loads(saved.read_text())["active"] == [str(disk.active)]


def test_merge(disk: Disk) -> None:
    result = command("merge", "--json", "--yes", *DROP, disk.active)
    assert result.code == 0 and result.err == ""
    found = result.json
    assert found["verified"]["mode"] == "moved" and found["verified"]["identical"] is True
    assert found["verified"]["compared_bytes"] > 0 and found["seconds"] > 0
    assert found["groups"][0]["chosen"]
    disk.expect({"base.qcow2": "base.qcow2", "l3.qcow2": "l3.qcow2"})


def test_merge_for_a_person(disk: Disk) -> None:
    result = on_terminal("merge", "--yes", "--flatten", "--verify", "full", disk.active)
    assert result.code == 0 and result.err == ""
    assert "verified (full)" in result.out
    assert max(map(len, result.out.splitlines())) <= 80
    disk.expect({"l3.qcow2": "l3.qcow2"})


def test_nothing_to_do(tmp_path: Path) -> None:
    disk = build(tmp_path / "d", LAYERS[:2])
    result = command("merge", "--yes", "--collapse", disk.active)
    assert result.code == 0 and "nothing to do" in result.out
    untouched(disk)


def test_a_dry_run_changes_nothing_and_runs_as_it_stands(disk: Disk) -> None:
    """The printed commands, given to a shell, do the merge."""
    script = command("merge", "--dry-run", *DROP, "--strategy", "commit", disk.active)
    assert script.code == 0
    untouched(disk)
    subprocess.run(["sh", "-e"], input=script.out, text=True, check=True, capture_output=True)
    disk.expect({"base.qcow2": "base.qcow2", "l3.qcow2": "l3.qcow2"})


def test_commands_with_hostile_names(tmp_path: Path) -> None:
    names = ["base.qcow2", "a'b \x1b[2J\n$(x).qcow2", "top\\.qcow2"]
    disk = build(tmp_path / "d", LAYERS[:3], names)
    result = command("plan", "--dry-run", "--flatten", disk.active)
    assert result.code == 0
    assert all(line.isprintable() for line in result.out.splitlines())
    subprocess.run(["bash", "-n"], input=result.out, text=True, check=True)
    removed = [line for line in result.out.splitlines() if line.startswith("rm -f") and "a" in line]
    words = subprocess.run(
        ["bash", "-c", "\n".join(f"printf '%s\\0' {line}" for line in removed)],
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    assert os.fsencode(disk.paths[1]) in words


def test_refusals(disk: Disk) -> None:
    other = disk.directory / "clone.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "l1.qcow2", "-F", "qcow2", other],
        check=True,
        cwd=disk.directory,
    )
    for name in ("plan", "merge"):
        extra = ["--yes"] if name == "merge" else []
        result = run(name, "--json", *extra, *DROP, disk.active)
        assert str(other) in result.fails(3)
        (refusal,) = result.json["refusals"]
        assert str(other) in refusal and result.json["steps"] == []
        assert "verified" not in result.json
        assert run(name, "--dry-run", *DROP, disk.active).out == ""
    other.unlink()
    untouched(disk)


def test_several_refusals_are_one_line(tmp_path: Path) -> None:
    disk = build(tmp_path / "d", LAYERS[:3])
    for path in disk.paths[1:]:
        subprocess.run(["qemu-img", "snapshot", "-c", "s", path], check=True)
    line = run("merge", "--yes", "--flatten", disk.active).fails(3)
    assert line.endswith(" (1 more reason: see --json)")
    listed = run("plan", "--json", "--flatten", disk.active)
    assert len(listed.json["refusals"]) == 2 and listed.fails(3) == line
    # For a person, all of them stand in the plan.
    shown = run("plan", "--flatten", disk.active).out.splitlines()
    assert [text for text in shown if text.startswith("refused: ")] == [
        f"refused: {text}" for text in listed.json["refusals"]
    ]


def test_on_a_terminal_each_refusal_is_shown_once(tmp_path: Path) -> None:
    disk = build(tmp_path / "d", LAYERS[:3])
    for path in disk.paths[1:]:
        subprocess.run(["qemu-img", "snapshot", "-c", "s", path], check=True)
    listed = run("plan", "--json", "--flatten", disk.active).json["refusals"]
    ours, theirs = pty.openpty()
    words = [COMMAND, "merge", "--flatten", disk.active]
    done = subprocess.run(words, stdin=theirs, stdout=theirs, stderr=theirs, check=False)
    os.close(theirs)
    seen = "".join(os.read(ours, 65536).decode().split())
    os.close(ours)
    assert done.returncode == 3 and len(listed) == 2
    assert [seen.count("".join(line.split())) for line in listed] == [1, 1], seen
    assert "[y/N]" not in seen


@pytest.mark.parametrize("name", ["plan", "merge", "commit", "pull"])
def test_the_help_names_the_choices(name: str) -> None:
    words = run(name, "--help").out
    assert "--engine" in words and "qemu-img" in words and "moved, full, manifest or none" in words


def test_a_mistake_is_told_before_the_question(disk: Disk) -> None:
    """Without --yes and without a terminal: first what no --yes would help."""
    merge = ("merge", disk.active)
    assert "other.qcow2" in command(*merge, "--drop", "other.qcow2").fails(2)
    assert "none.qcow2" in command("merge", disk.directory / "none.qcow2", "--flatten").fails(4)
    subprocess.run(["qemu-img", "snapshot", "-c", "s", disk.paths[1]], check=True)
    assert "internal snapshot" in command(*merge, *DROP).fails(3)
    subprocess.run(["qemu-img", "snapshot", "-d", "s", disk.paths[1]], check=True)
    for name, words in (("merge", DROP), ("commit", ()), ("pull", ())):
        assert "add --yes" in command(name, disk.active, *words).fails(2)
    untouched(disk)


def test_names_that_are_not_in_the_chain(disk: Disk) -> None:
    assert "other.qcow2" in run("plan", "--drop", "other.qcow2", disk.active).fails(2)
    assert "active" in run("plan", "--drop", "l3.qcow2", disk.active).fails(2)


def test_an_image_in_use_is_refused_even_with_force_share(disk: Disk) -> None:
    argv = ["qemu-io", "-f", "qcow2", str(disk.active)]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write("length\n")
        child.stdin.flush()
        child.stdout.readline()
        command("merge", "--json", "--yes", *DROP, disk.active).fails(3)
        command("merge", "--json", "--yes", "-U", *DROP, disk.active).fails(3)
    finally:
        child.kill()
        child.communicate()
    untouched(disk)


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("\n", 3), ("n\n", 3), ("\x04", 3)])
def test_the_question(disk: Disk, answer: str, code: int) -> None:
    """On a terminal the plan is shown, and only a yes merges."""
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    done = subprocess.run(
        [COMMAND, "merge", *DROP, disk.active],
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == code, done.stderr
    assert "[y/N]" in done.stderr and "after" in done.stdout
    if code:
        assert "nothing was changed" in done.stderr
        untouched(disk)
    else:
        disk.expect({"base.qcow2": "base.qcow2", "l3.qcow2": "l3.qcow2"})


def test_progress_as_events(disk: Disk) -> None:
    result = command("merge", "--yes", "--json", "--progress", "json", *DROP, disk.active)
    assert result.code == 0 and result.json["verified"]["identical"]
    events = [json.loads(line) for line in result.err.splitlines()]
    assert len(events) > 3
    for event in events:
        assert event.keys() == {"event", "step", "done", "total"}
        assert event["event"] == "progress"
    one_whole([event for event in events if event["step"] != "planning"])
    assert {"commit", "verify"} <= {event["step"].split()[0] for event in events}


def test_progress_of_a_copy_and_of_a_recovery(disk: Disk) -> None:
    result = command("copy", "--progress", "json", disk.active, disk.active.with_name("new"))
    one_whole([json.loads(line) for line in result.err.splitlines()])
    drop = ["l1.qcow2", "l2.qcow2"]
    stopped(disk, drop, MergeOptions(), lambda _, step: isinstance(step, Compare))
    result = command("recover", "--progress", "json", disk.directory)
    assert result.code == 0, result.err
    one_whole([json.loads(line) for line in result.err.splitlines()])


def one_whole(events: list[dict[str, Any]]) -> None:
    """One total from the first event on; what is done grows, from nothing to the total."""
    (total,) = {event["total"] for event in events}
    done = [event["done"] for event in events]
    assert total > 0 and done == sorted(done) and (done[0], done[-1]) == (0, total)


def test_a_verification_that_was_not_wanted(disk: Disk) -> None:
    found = run("merge", "--yes", "--json", "--verify", "none", *DROP, disk.active).json
    assert found["verified"] == {"mode": "none", "compared_bytes": 0, "identical": False}


def test_a_qemu_img_that_fails(disk: Disk, tmp_path: Path) -> None:
    broken = tmp_path / "qemu-img"
    broken.write_text("#!/bin/sh\necho 'qemu-img: no, thanks' >&2\nexit 1\n")
    broken.chmod(0o755)
    result = command("merge", "--yes", "--json", *DROP, disk.active, QCHAIN_QEMU_IMG=str(broken))
    assert "no, thanks" in result.fails(5)
    untouched(disk)
    missing = command("merge", "--yes", *DROP, disk.active, QCHAIN_QEMU_IMG="/none/qemu-img")
    assert "/none/qemu-img" in missing.fails(4)
    untouched(disk)


@pytest.mark.parametrize("name", ["base.qcow2", "l1.qcow2", "notes.txt"])
@pytest.mark.parametrize("words", [("plan",), ("merge", "--yes"), ("merge", "--dry-run")])
def test_a_plan_is_never_written_over_another_file(
    tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    active = build(tmp_path, ["64k:A", "64k:B", "64k:C"]).active
    (tmp_path / "notes.txt").write_text("{mine}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run(words[0], active, "--drop", "l1.qcow2", *words[1:], "-o", tmp_path / name)
    assert "exists already" in result.err and result.code == 3
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_plan_may_be_written_over_an_older_one(tmp_path: Path) -> None:
    active = build(tmp_path, ["64k:A", "64k:B", "64k:C"]).active
    for _ in range(2):
        assert run("plan", active, "--flatten", "-o", tmp_path / "p.json").code == 0


def test_interrupted_before_the_first_write(disk: Disk) -> None:
    """While it asks, and while it makes sure that it is alone."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [COMMAND, "merge", *DROP, disk.active],
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    assert child.stderr is not None
    seen = ""
    while "[y/N]" not in seen:
        seen += child.stderr.read(1)
    child.send_signal(signal.SIGINT)
    rest = child.communicate(timeout=60)[1]
    os.close(ours)
    assert child.returncode == 130
    assert rest.splitlines()[-1] == "qchain: interrupted: nothing was changed"
    untouched(disk)


def test_interrupted_while_it_takes_the_locks(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qchain.run.execute._unchanged", interrupt)
    line = run("merge", "--yes", *DROP, disk.active).fails(130)
    assert line == "qchain: interrupted: nothing was changed"
    untouched(disk)


@pytest.mark.parametrize("keep", [False, True])
def test_which_name_goes_is_said_before(disk: Disk, keep: bool) -> None:
    """And true: of the names that the plan speaks of."""
    words = [disk.active, "--flatten", "--names", "lowest", *(["--keep-files"] if keep else [])]
    shown = run("plan", *words).out
    lowest, live = disk.paths[0].name, disk.active.name
    assert (f"{live} goes; what used it is to use {lowest}" in shown) is not keep
    assert (".qchain-old" in shown) is keep
    assert run("merge", *words, "--yes").code == 0
    assert disk.active.exists() is keep
    assert raw_of(disk.paths[0]) == disk.points[live]


def test_what_several_groups_take_is_added_up(disk: Disk) -> None:
    words = [disk.active, *(f"--drop={path.name}" for path in disk.paths[:-1:2])]
    groups = run("plan", *words, "--json").json["groups"]
    assert len(groups) == 2
    grown = [c["target_growth_bytes"] for g in groups for c in g["candidates"]
             if c["feasible"] and c["target"] == g["target"]]  # fmt: skip
    assert f"files grow by {size_text(sum(grown))}," in run("plan", *words).out
