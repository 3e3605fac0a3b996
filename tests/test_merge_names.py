"""Where the names lie and what they look like: other directories, links, hostile file names.

What the headers record is read from their bytes (`recorded` of the rows' tests), and
every point is read by qemu-img under the name that the user uses.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_runner import run
from merging import build, format_of
from stopping import killed
from test_merge_rows import LINES, recorded

from fixtures.build import build_layer
from fixtures.language import parse_layer, resolve_sizes
from fixtures.oracle import qemu_check, raw_of
from fixtures.shadow import shadow_points
from qchain.chain.chain import open_chain
from qchain.chain.gate import Gate
from qchain.errors import FailedMidway, NotAllowed
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Unlink
from qchain.run.execute import execute
from qchain.run.recover import journals_at, recover

POLICIES = ["kept", "lowest", "target"]
WAYS = ["pull", "commit", "both"]


def lay(paths: Sequence[Path], backing: Sequence[str | None], base_format: str = "qcow2") -> None:
    """Build base, a, b, top at `paths`; `backing[i]` is what the header of i records."""
    lines = list(LINES.values())[: len(paths)]
    if base_format == "raw":
        lines[0] = f"[raw] {lines[0]}"
    specs = [parse_layer(line) for line in lines]
    for index, (path, size) in enumerate(zip(paths, resolve_sizes(lines), strict=True)):
        name = backing[index]
        below = None if name is None else (name, specs[index - 1].format)
        build_layer(path, specs[index], size, below)


def points_of(count: int) -> list[bytes]:
    return shadow_points(list(LINES.values())[:count])


def merge(
    active: Path, drop: Sequence[Path], options: MergeOptions, gate: Gate | None = None
) -> Plan:
    with open_chain(active, gate) as chain:
        plan = make_plan(chain, Request(drop=tuple(map(str, drop))), options)
        assert not plan.refusals, plan.refusals
        assert execute(plan, chain).identical
    return plan


def reads(path: Path, point: bytes) -> None:
    assert raw_of(path, format_of(path)) == point, f"{path} reads something else"
    if format_of(path) == "qcow2":
        assert qemu_check(path) == {"corruptions": 0, "leaks": 0}


def everything(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.is_file() or path.is_symlink()}


# --- other directories --------------------------------------------------------------


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("names", POLICIES)
@pytest.mark.parametrize("strategy", WAYS)
def test_every_layer_in_a_directory_of_its_own(
    tmp_path: Path, strategy: str, names: str, absolute: bool
) -> None:
    """a and b go into top, or top and b into a, or both into b; base stays below."""
    paths = [tmp_path / d / f"{d}.qcow2" for d in ("base", "a", "b", "top")]
    backing: list[str | None] = [None]
    for below, path in itertools.pairwise(paths):
        backing.append(str(below) if absolute else os.path.relpath(below, path.parent))
    lay(paths, backing)
    points = points_of(4)
    options = MergeOptions(strategy=strategy, names=names)
    merge(paths[3], paths[1:3], options, Gate(allow=(tmp_path,)))
    target = {"pull": paths[3], "commit": paths[1], "both": paths[2]}[strategy]
    result = {"kept": paths[3], "lowest": paths[1], "target": target}[names]
    reads(result, points[3])
    reads(paths[0], points[0])
    assert everything(tmp_path) == {paths[0], result}
    assert recorded(result)[1] == "qcow2"
    name = recorded(result)[0]
    assert name == (str(paths[0]) if absolute else "../base/base.qcow2")


@pytest.mark.parametrize("names", POLICIES)
@pytest.mark.parametrize("strategy", ["pull", "commit"])
def test_the_image_above_is_re_pointed_across_directories(
    tmp_path: Path, strategy: str, names: str
) -> None:
    """a goes: b is kept, and top, elsewhere, backs on it."""
    paths = [tmp_path / d / f"{d}.qcow2" for d in ("base", "a", "b", "top")]
    backing = [None, "../base/base.qcow2", "../a/a.qcow2", "../b/b.qcow2"]
    lay(paths, backing)
    points = points_of(4)
    options = MergeOptions(strategy=strategy, names=names)
    merge(paths[3], [paths[1]], options, Gate(follow=True))
    target = {"pull": paths[2], "commit": paths[1]}[strategy]
    result = {"kept": paths[2], "lowest": paths[1], "target": target}[names]
    for path, point in ((paths[3], 3), (result, 2), (paths[0], 0)):
        reads(path, points[point])
    assert everything(tmp_path) == {paths[0], result, paths[3]}
    assert recorded(paths[3]) == (os.path.relpath(result, paths[3].parent), "qcow2")
    assert recorded(result) == ("../base/base.qcow2", "qcow2")


def test_a_chain_that_leaves_its_directory_is_not_followed_unasked(tmp_path: Path) -> None:
    paths = [tmp_path / d / f"{d}.qcow2" for d in ("base", "a")]
    lay(paths, [None, "../base/base.qcow2"])
    with pytest.raises(NotAllowed, match="--allow"):
        open_chain(paths[1])


# --- symbolic links to directories --------------------------------------------------


@pytest.mark.parametrize("names", POLICIES)
@pytest.mark.parametrize("strategy", WAYS)
def test_a_link_to_the_directory(tmp_path: Path, strategy: str, names: str) -> None:
    """The user goes in by a link; the files stay where they are."""
    real, link = tmp_path / "deep" / "er" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    link.symlink_to(real)
    files = ["base.qcow2", "a.qcow2", "b.qcow2", "top.qcow2"]
    lay([real / name for name in files], [None, *files[:3]])
    points = points_of(4)
    options = MergeOptions(strategy=strategy, names=names)
    plan = merge(link / files[3], [link / files[1], link / files[2]], options)
    result = plan.groups[0].result
    assert result is not None and result.parent == link
    reads(real / result.name, points[3])
    reads(real / files[0], points[0])
    assert everything(real) == {real / files[0], real / result.name}
    assert recorded(result) == (files[0], "qcow2")


@pytest.mark.parametrize("names", POLICIES)
@pytest.mark.parametrize("strategy", WAYS)
def test_images_under_links(tmp_path: Path, strategy: str, names: str) -> None:
    """A link stays one, and leads to the result; the file changes where it lies."""
    real, known = tmp_path / "real", tmp_path / "known"
    real.mkdir()
    known.mkdir()
    files = ["base.qcow2", "a.qcow2", "b.qcow2", "top.qcow2"]
    for name in files:
        (known / name).symlink_to(Path("..", "real", name))
    lay([real / name for name in files], [None, *(str(known / name) for name in files[:3])])
    points = points_of(4)
    options = MergeOptions(strategy=strategy, names=names)
    drop = [known / "a.qcow2", known / "b.qcow2"]
    with open_chain(known / "top.qcow2", Gate(follow=True)) as chain:
        plan = make_plan(chain, Request(drop=tuple(map(str, drop))), options)
        assert not plan.refusals
        document = plan.as_json()
        assert document["active"] == [str(known / "top.qcow2")]
        assert killed(plan, chain, lambda _number, step: isinstance(step, Unlink))
    top = known / "top.qcow2"
    assert not top.exists() or "not finished" in run("chain", "--follow", top).err
    (journal,) = journals_at(known / "top.qcow2")
    assert journal.parent == real
    recover([journal])
    result = plan.groups[0].result
    assert result is not None and result.parent == real
    reads(known / result.name, points[3])
    reads(known / "base.qcow2", points[0])
    assert everything(real) == {real / "base.qcow2", result}
    assert {path.name for path in known.iterdir()} == set(files)
    assert all(path.is_symlink() for path in known.iterdir())
    assert recorded(result) == (str(known / "base.qcow2"), "qcow2")


@pytest.mark.parametrize("names", POLICIES)
@pytest.mark.parametrize("strategy", WAYS)
def test_names_that_count_from_a_link(tmp_path: Path, strategy: str, names: str) -> None:
    """What is opened through a link finds its backing file from the link's directory.

    Killed before any step: every kept point reads right by the name that its user has.
    """
    number, came = WAYS.index(strategy), True
    while came:
        place = tmp_path / str(number)
        real, known = place / "real", place / "deep" / "er"
        real.mkdir(parents=True)
        known.mkdir(parents=True)
        files = [known / f"{name}.qcow2" for name in ("base", "a", "b", "top")]
        lay(files, [None, "base.qcow2", str(files[1]), str(files[2])])
        for path in files[2:]:
            path.rename(real / f"x{path.name}")
            path.symlink_to(real / f"x{path.name}")
        points = points_of(4)
        options = MergeOptions(strategy=strategy, names=names)
        with open_chain(files[3], Gate(follow=True)) as chain:
            plan = make_plan(chain, Request(drop=("a.qcow2", "b.qcow2")), options)
            assert not plan.refusals, plan.refusals
            came = killed(plan, chain, lambda seen, _step, at=number: seen == at)
        result = plan.groups[0].result
        assert result is not None
        for path, point in ((files[0], points[0]), (files[3], points[3])):
            if path.exists():
                reads(path, point)
        recover(journals_at(real) + journals_at(known))
        for path in (result, *files):
            if path.exists() and path.samefile(result):
                reads(path, points[3])
        number += 5


@pytest.mark.parametrize("hops", [1, 2])
def test_an_overlay_that_lies_beside_a_link(tmp_path: Path, hops: int) -> None:
    real, known, other = tmp_path / "real", tmp_path / "known", tmp_path / "other"
    for directory in (real, known, other):
        directory.mkdir()
    files = [known / name for name in ("base.qcow2", "a.qcow2", "top.qcow2")]
    lay(files, [None, *map(str, files[:2])])
    stranger = (known, other)[hops - 1] / "stranger.qcow2"
    for path in files[1:]:
        path.rename(real / path.name)
        if hops == 2:
            (other / path.name).symlink_to(real / path.name)
        path.symlink_to((real, other)[hops - 1] / path.name)
    # Only this directory holds it, and only the names of links lead there.
    build_layer(stranger, parse_layer("1M:-"), 1 << 20, ("a.qcow2", "qcow2"))
    (tmp_path / "elsewhere").mkdir()
    files[0].rename(tmp_path / "elsewhere" / "base.qcow2")
    files[0].symlink_to(tmp_path / "elsewhere" / "base.qcow2")
    with open_chain(files[2], Gate(follow=True)) as chain:
        plan = make_plan(chain, Request(drop=("a.qcow2",)))
    assert any("stranger.qcow2: backs on a.qcow2" in line for line in plan.refusals)


def test_a_saved_plan_of_links(tmp_path: Path) -> None:
    real, known = tmp_path / "real", tmp_path / "known"
    real.mkdir()
    known.mkdir()
    files = [known / name for name in ("base.qcow2", "a.qcow2", "top.qcow2")]
    lay(files, [None, *map(str, files[:2])])
    for path in files:
        path.rename(real / f"x{path.name}")
        path.symlink_to(real / f"x{path.name}")
    saved = tmp_path / "plan.json"
    words = ("--follow", "--drop", "a.qcow2", "-o", str(saved), str(files[2]))
    assert run("plan", *words).code == 0
    assert run("apply", "--follow", "--yes", str(saved)).code == 0
    reads(files[2], points_of(3)[2])
    assert not files[1].exists()


def test_a_link_from_which_names_mean_others(tmp_path: Path) -> None:
    """Relative ones, where the links lie in another directory than the files."""
    (tmp_path / "top.real").mkdir()
    files = [tmp_path / "base.qcow2", tmp_path / "a.qcow2", tmp_path / "top.qcow2"]
    lay(files, [None, "base.qcow2", "a.qcow2"])
    files[2].rename(tmp_path / "top.real" / "x")
    files[2].symlink_to(tmp_path / "top.real" / "x")
    reads(files[2], points_of(3)[2])
    for strategy in ("pull", "commit"):
        with open_chain(files[2], Gate(follow=True)) as chain:
            options = MergeOptions(strategy=strategy)
            plan = make_plan(chain, Request(drop=("a.qcow2",)), options)
        assert any("its backing name means something else" in line for line in plan.refusals)


@pytest.mark.parametrize("names", POLICIES)
@pytest.mark.parametrize("strategy", WAYS)
def test_a_way_up_from_within_a_link(tmp_path: Path, strategy: str, names: str) -> None:
    """`..` behind a link to a directory is the parent of where it leads, not of the link."""
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "low").mkdir()
    (tmp_path / "up").symlink_to(tmp_path / "x" / "y")
    # A trap: what the names would mean, were they shortened as text.
    (tmp_path / "low").mkdir()
    trap = tmp_path / "low" / "base.qcow2"
    lay([trap], [None])
    paths = [
        tmp_path / "x" / "low" / "base.qcow2",
        tmp_path / "x" / "y" / "a.qcow2",
        tmp_path / "b.qcow2",
        tmp_path / "top.qcow2",
    ]
    lay(paths, [None, "../low/base.qcow2", "up/a.qcow2", "b.qcow2"])
    points = points_of(4)
    raw_of(paths[3])
    options = MergeOptions(strategy=strategy, names=names)
    drop = [paths[1], paths[2]]
    before = trap.read_bytes()
    merge(paths[3], drop, options, Gate(follow=True))
    target = {"pull": paths[3], "commit": paths[1], "both": paths[2]}[strategy]
    result = {"kept": paths[3], "lowest": paths[1], "target": target}[names]
    reads(result, points[3])
    reads(paths[0], points[0])
    assert trap.read_bytes() == before
    links = {tmp_path / "up"}
    assert everything(tmp_path) - links == {paths[0], trap, result}
    name, _ = recorded(result)
    assert name is not None
    assert (result.parent / name).samefile(paths[0])


# --- another filesystem --------------------------------------------------------------


@pytest.mark.parametrize("names", ["lowest", "target"])
def test_over_two_filesystems_without_a_rename(tmp_path: Path, names: str) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert Path(other).stat().st_dev != tmp_path.stat().st_dev
        paths = [Path(other) / "base.qcow2", Path(other) / "a.qcow2", tmp_path / "b.qcow2"]
        lay(paths, [None, "base.qcow2", str(paths[1])])
        gate = Gate(allow=(Path(other),))
        merge(paths[2], [paths[1]], MergeOptions(strategy="commit", names=names), gate)
        reads(paths[1], points_of(3)[2])
        assert everything(tmp_path) == set() and everything(Path(other)) == set(paths[:2])


def test_over_two_filesystems_the_kept_name_allows_only_a_pull(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        paths = [Path(other) / "base.qcow2", Path(other) / "a.qcow2", tmp_path / "b.qcow2"]
        lay(paths, [None, "base.qcow2", str(paths[1])])
        gate = Gate(allow=(Path(other),))
        with open_chain(paths[2], gate) as chain:
            plan = make_plan(chain, Request(drop=("a.qcow2",)), MergeOptions(strategy="commit"))
            assert ["another filesystem" in line for line in plan.refusals] == [True]
        merge(paths[2], [paths[1]], MergeOptions(), gate)
        reads(paths[2], points_of(3)[2])
        assert everything(tmp_path) == {paths[2]} and everything(Path(other)) == {paths[0]}
        name, _ = recorded(paths[2])
        assert name == os.path.relpath(paths[0], tmp_path)  # relative, as a's was


@pytest.mark.parametrize("names", ["lowest", "target"])
def test_a_target_far_from_the_name_that_stays(tmp_path: Path, names: str) -> None:
    """`lowest` lies on another filesystem than the target: refused, or done right; never half."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        paths = [Path(other) / "base.qcow2", tmp_path / "a.qcow2", tmp_path / "b.qcow2"]
        lay(paths, [None, str(paths[0]), "a.qcow2"])
        points = points_of(3)
        gate = Gate(allow=(Path(other),))
        options = MergeOptions(strategy="pull", names=names)
        with open_chain(paths[2], gate) as chain:
            plan = make_plan(chain, Request(flatten=True), options)
            if names == "target":
                assert execute(plan, chain).identical
                reads(paths[2], points[2])
            else:
                assert ["another filesystem" in line for line in plan.refusals] == [True]
                reads(paths[2], points[2])


# --- hostile names ------------------------------------------------------------------

HOSTILE = ["a b", "a,b=c,,d", 'it\'s "q"', "a\nb", "ä€\u200b", "-rf", "%s$HOME`x`;&|*?", "b\udcffs"]


@pytest.mark.parametrize("strategy", WAYS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_names(tmp_path: Path, name: str, strategy: str) -> None:
    paths = [tmp_path / f"{name}.{number}" for number in range(4)]
    lay(paths, [None, *(path.name for path in paths[:3])])
    points = points_of(4)
    names = {"pull": "kept", "commit": "lowest", "both": "target"}[strategy]
    plan = merge(paths[3], paths[1:3], MergeOptions(strategy=strategy, names=names))
    result = plan.groups[0].result
    assert result == {"pull": paths[3], "commit": paths[1], "both": paths[2]}[strategy]
    plain = tmp_path / "plain"
    # The judge shall not stumble over the name itself.
    os.link(result, plain)
    reads(plain, points[3])
    plain.unlink()
    assert everything(tmp_path) == {paths[0], result}


@pytest.mark.parametrize("strategy", WAYS)
@pytest.mark.parametrize("name", ["a:b", "nbd:x", *HOSTILE])
def test_hostile_directory_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, strategy: str
) -> None:
    """Named relative to the working directory, as a user types it."""
    directory = tmp_path / name
    directory.mkdir()
    files = ["base.qcow2", "a.qcow2", "b.qcow2", "top.qcow2"]
    lay([directory / file for file in files], [None, *files[:3]])
    monkeypatch.chdir(tmp_path)
    here = Path(name)
    merge(here / files[3], [here / files[1], here / files[2]], MergeOptions(strategy=strategy))
    reads(directory / files[3], points_of(4)[3])
    assert everything(directory) == {directory / files[0], directory / files[3]}


@pytest.mark.parametrize("strategy", WAYS)
def test_a_colon_in_the_backing_name(tmp_path: Path, strategy: str) -> None:
    """Recorded as './x:y', which is no protocol, and it stays so."""
    paths = [tmp_path / f"x:{number}" for number in range(4)]
    lay(paths, [None, *(f"./{path.name}" for path in paths[:3])])
    merge(paths[3], paths[1:3], MergeOptions(strategy=strategy))
    reads(paths[3], points_of(4)[3])
    assert recorded(paths[3]) == ("./x:0", "qcow2")


def test_a_backing_name_that_fills_the_header(tmp_path: Path) -> None:
    """512-byte clusters leave about 300 bytes for the name: a failure changes nothing."""
    deep = tmp_path / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    base, mid, top = deep / "base.qcow2", deep / "mid.qcow2", tmp_path / "top.qcow2"
    lay([base, mid], [None, "base.qcow2"])
    spec = parse_layer("[cluster=512] 1k:F 1k:- 512:F")
    relative = os.path.relpath(mid, tmp_path)
    build_layer(top, spec, 1 << 20, (relative, "qcow2"))
    old, lower = raw_of(top), raw_of(mid)
    try:
        merge(top, [mid], MergeOptions(strategy="pull"), Gate(allow=(tmp_path,)))
    except FailedMidway:
        assert raw_of(mid) == lower
    assert raw_of(top) == old
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".qchain")]


def test_a_copy_under_a_raw_name_is_refused(tmp_path: Path) -> None:
    """The kept image reads through it, as raw, until it is deleted: found by `make torture`."""
    disk = build(tmp_path, ["[raw] 64k:A 64k:B", "64k:C"])
    options = MergeOptions(strategy="copy", names="lowest", allow_format_change=True)
    plan = disk.plan(Request(drop=("base.raw",)), options)
    assert "reads through base.raw as raw" in plan.refusals[0]


@pytest.mark.parametrize("strategy", ["pull", "commit", "copy"])
def test_a_link_to_what_only_stays(tmp_path: Path, strategy: str) -> None:
    """It is read, not merged; with several groups a recovery must still know it by its link."""
    names = ["base.qcow2", "a.qcow2", "b.qcow2", "c.qcow2", "top.qcow2"]
    lines = [*list(LINES.values())[:4], "64k:E"]
    number, came = 0, True
    while came:
        disk = build(tmp_path / str(number), lines, [name.split(".")[0] for name in names])
        real = disk.directory / "real.qcow2"
        disk.paths[0].rename(real)
        disk.paths[0].symlink_to(real.name)
        with open_chain(disk.active) as chain:
            options = MergeOptions(strategy=strategy)
            plan = make_plan(chain, Request(drop=("a.qcow2", "c.qcow2")), options)
            assert not plan.refusals, plan.refusals
            came = killed(plan, chain, lambda seen, _step, at=number: seen == at)
        recover(journals_at(disk.directory))
        for name in ("base.qcow2", "b.qcow2", "top.qcow2"):
            reads(disk.directory / name, disk.points[name])
        left = {path.name for path in disk.directory.iterdir()}
        assert left == {"base.qcow2", "b.qcow2", "top.qcow2", "real.qcow2"}
        number += 7
