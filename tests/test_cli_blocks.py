"""`qchain commit` and `qchain pull`: the rows of the operations in virsh's words."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import run
from merging import Disk, build

LAYERS = ["64k:A 64k:A 64k:-", "64k:- 64k:B 64k:-", "128k:- 64k:C", "32k:D 160k:-"]
NAMES = ["base.qcow2", "a.qcow2", "b.qcow2", "top.qcow2"]
RAW = ["[raw] 64k:A 64k:A 64k:-", *LAYERS[1:]]

COMMITS = {
    "T6": (["--base", "base.qcow2", "--top", "a.qcow2"], {"base": "a", "b": "b", "top": "top"}),
    "T7": (["--base", "a.qcow2", "--top", "b.qcow2"], {"base": "base", "a": "b", "top": "top"}),
    "T8": (["--top", "b.qcow2"], {"base": "b", "top": "top"}),
    "T12 to b": (["--base", "b.qcow2"], {"base": "base", "a": "a", "b": "top"}),
    "T12 to a": (["--base", "a.qcow2"], {"base": "base", "a": "top"}),
    "T12 to base": ([], {"base": "top"}),
}
PULLS = {
    "T9": ("top.qcow2", [], {"top": "top"}),
    "T10": ("top.qcow2", ["--base", "base.qcow2"], {"base": "base", "top": "top"}),
    "T11": ("top.qcow2", ["--base", "a.qcow2"], {"base": "base", "a": "a", "top": "top"}),
    "T13": ("b.qcow2", ["--base", "base.qcow2"], {"base": "base", "b": "b", "top": "top"}),
}


def made(directory: Path, base: str) -> tuple[Disk, str]:
    """The chain, and the file name of its base."""
    first = "base.qcow2" if base == "qcow2" else "base.raw"
    disk = build(directory, LAYERS if base == "qcow2" else RAW, [first, *NAMES[1:]])
    return disk, first


def renamed(points: dict[str, str], first: str) -> dict[str, str]:
    """Short names as file names."""
    full = {"base": first, "a": "a.qcow2", "b": "b.qcow2", "top": "top.qcow2"}
    return {full[name]: full[point] for name, point in points.items()}


@pytest.mark.parametrize("base", ["qcow2", "raw"])
@pytest.mark.parametrize("row", COMMITS)
def test_commit(row: str, base: str, tmp_path: Path) -> None:
    disk, first = made(tmp_path / "d", base)
    options, points = COMMITS[row]
    options = [first if word == "base.qcow2" else word for word in options]
    result = run("commit", disk.active, *options, "--yes")
    assert result.code == 0, result.err
    assert result.out.startswith("The points of ") and "all identical" in result.out
    disk.expect(renamed(points, first))


@pytest.mark.parametrize("base", ["qcow2", "raw"])
@pytest.mark.parametrize("row", PULLS)
def test_pull(row: str, base: str, tmp_path: Path) -> None:
    disk, first = made(tmp_path / "d", base)
    image, options, points = PULLS[row]
    options = [first if word == "base.qcow2" else word for word in options]
    result = run("pull", disk.directory / image, *options, "--yes", "--json")
    assert result.code == 0, result.err
    assert [group["chosen"] for group in result.json["groups"]] == ["pull"]
    disk.expect(renamed(points, first))


def test_nothing_between(tmp_path: Path) -> None:
    disk, _ = made(tmp_path / "d", "qcow2")
    for words in (["pull", disk.active, "--base", "b.qcow2"], ["pull", disk.paths[0]]):
        result = run(*words, "--yes")
        assert result.code == 0 and "nothing to do" in result.out
    disk.expect({path.name: path.name for path in disk.paths})


def test_wrong_words(tmp_path: Path) -> None:
    disk, _ = made(tmp_path / "d", "qcow2")
    active = disk.active
    upside_down = run("commit", active, "--base", "b.qcow2", "--top", "a.qcow2", "--yes")
    assert "is not below a.qcow2" in upside_down.fails(2)
    assert "is not in the chain" in run("commit", active, "--base", "x", "--yes").fails(2)
    assert "its own base" in run("pull", active, "--base", "top.qcow2", "--yes").fails(2)
    assert "--yes" in run("pull", active).fails(2)
    disk.expect({path.name: path.name for path in disk.paths})


def test_another_overlay_needs_what_would_vanish(tmp_path: Path) -> None:
    """Row P6: a point that something else shows must not be written over."""
    from fixtures.oracle import qemu_img

    disk, _ = made(tmp_path / "d", "qcow2")
    other = disk.directory / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", other)
    said = run("commit", disk.active, "--top", "a.qcow2", "--yes").fails(3)
    assert "other.qcow2: backs on base.qcow2" in said
    expected = {path.name: path.name for path in disk.paths}
    disk.expect(expected, complete=False)


def test_dry_run_is_commands_alone(tmp_path: Path) -> None:
    disk, _ = made(tmp_path / "d", "qcow2")
    result = run("commit", disk.active, "--dry-run")
    assert result.code == 0 and "vanish" not in result.out
    assert any(line.startswith("qemu-img commit ") for line in result.out.splitlines())
    disk.expect({path.name: path.name for path in disk.paths})
