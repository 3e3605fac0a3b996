"""What commands say to those who use them for the first time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import COMMAND, on_terminal, run
from merging import Disk, build
from test_merge_refusals import opened_by_qemu
from test_trees import CLONES, found_in, grown

from qchain.plan.options import ENGINES, NAMES, PREFER, STRATEGIES, VERIFY

LINES = ["256k:A", "64k:- 64k:B 128k:-", "64k:C 192k:-"]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return build(tmp_path / "d", LINES)


def test_where_overlays_were_looked_for(disk: Disk, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    words = ["plan", "--drop", "l1.qcow2", "--scan", other, "--scan", disk.directory, disk.active]
    assert run(*words, "--json").json["scanned"] == [str(disk.directory), str(other)]
    assert (
        f"Other overlays were looked for in {disk.directory}, {other}; elsewhere only with --scan."
    ) in run(*words).out


@pytest.mark.parametrize(
    ("option", "values", "later"),
    [
        ("--strategy", STRATEGIES, None),
        ("--engine", ENGINES, "native"),
        ("--names", NAMES, None),
        ("--prefer", PREFER, None),
        ("--verify", VERIFY, None),
    ],
)
def test_only_what_there_is_is_offered(
    disk: Disk, option: str, values: tuple[str, ...], later: str | None
) -> None:
    words = ["plan", "--json", "--drop", "l1.qcow2", disk.active, option]
    assert run(*words, "x").fails(2).endswith(f"one of: {', '.join(values)}")
    for value in values:
        assert run(*words, value).code in (0, 3), value  # some need other options
    if later is not None and later not in values:
        assert "not in this version yet" in run(*words, later).fails(3)
    said = " ".join(run("plan", "--help").out.split())
    assert f"{', '.join(values[:-1])} or {values[-1]}" in said


@pytest.mark.parametrize("content", [b"QFI\xfb\0\0\0\3", b"\xff\xfe{}", bytes(range(256))])
def test_a_plan_that_is_no_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    said = run("apply", "--yes", path).fails(4)
    assert said == (
        f"qchain: {path}: is not a plan of qchain: it is no text; "
        "name a file that 'qchain plan -o' has written"
    )


def test_the_summaries_are_whole() -> None:
    lines = on_terminal("--help").out.splitlines()
    commands = lines[lines.index("Commands:") + 1 :]
    assert len(commands) > 20 and all(line.endswith((".", ").")) for line in commands if line)
    assert not any("..." in line for line in commands)


@pytest.mark.parametrize("words", [["commit"], ["commit", "--top", "base.qcow2"]])
def test_nothing_is_below_a_base(disk: Disk, words: list[str]) -> None:
    image = disk.paths[-1] if "--top" in words else disk.paths[0]
    said = run(*words, image, "--yes").fails(2)
    assert f"{disk.paths[0]}: has no backing file: there is nothing below it" in said
    done = run("pull", disk.paths[0], "--yes")
    assert done.code == 0
    assert f"{disk.paths[0]} has no backing file: there is nothing below it." in done.out
    assert "nothing to do" in done.out


WRITING = [
    "merge --yes --drop l1.qcow2 ACTIVE",
    "commit --yes ACTIVE",
    "pull --yes ACTIVE",
    "copy ACTIVE NEW",
    "snapshot ACTIVE --name NEW",
]


@pytest.mark.parametrize("line", WRITING)
def test_no_hint_at_what_is_refused(disk: Disk, line: str) -> None:
    """-U is a way to read an image in use, and none to write to it."""
    words = line.replace("ACTIVE", str(disk.active)).replace("NEW", str(disk.directory / "new"))
    with opened_by_qemu("-f", "qcow2", disk.active):
        said = run(*words.split()).fails(3)
        assert "in use by qemu-io" in said and "shut the guest off" in said
        assert "-U" not in said
        assert run(*words.split(), "-U").code == 3
        planned = ["plan", "--drop", "l1.qcow2", disk.active]
        assert "-U" in run(*planned).fails(3)
        assert run(*planned, "-U").code == 0


def test_what_another_group_inherits_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    disk = grown(tmp_path / "d", CLONES)
    tops = found_in(disk, ["x", "y", "z"])
    dropped = ["--drop", "low.qcow2", "--drop", "shared.qcow2"]
    text = run("plan", *tops, *dropped).out
    groups = text.split("Group ")[1:]
    assert len(groups) == 3
    for group in groups:
        assert group.count("others still back on it") <= 1
        assert "goes with another group" not in group
    assert text.count("others still back on it") == 2


def test_no_blank_lines_where_nothing_is_said(disk: Disk) -> None:
    """One dropped image has no image between to merge into."""
    done = run("plan", "--strategy", "both", "--drop", "l1.qcow2", disk.active)
    assert "no target for --strategy both" in done.fails(3)
    assert "\n\n\n" not in done.out and not done.out.startswith("\n")


def test_interrupted_while_it_is_loaded() -> None:
    """^C amid an import, whichever it is."""
    for name in ("typer", "qchain_cli.main", "qchain.errors"):
        code = (
            "import sys\n"
            "class Finder:\n"
            "    def find_spec(self, name, *_):\n"
            f"        if name == {name!r}: raise KeyboardInterrupt\n"
            "sys.meta_path.insert(0, Finder())\n"
            "from qchain_cli.start import start\n"
            "sys.exit(start())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        expected = (130, "", "qchain: interrupted: nothing was changed\n")
        assert (done.returncode, done.stdout, done.stderr) == expected


def test_the_command_begins_there() -> None:
    assert "qchain_cli.start" in COMMAND.read_text()
