"""`qchain rebase`: an image is led to another chain and reads as before, or nothing happens.

Judged by qemu-img, which reads every image before and after, and by the shadow model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runner import command, run
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from merging import Disk, build, format_of
from test_merge_refusals import linked, moved_behind_a_link, set_feature, snapshot, unrecord_format
from test_trees import grown

from fixtures.build import build_chain
from fixtures.generate import chains
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_check, qemu_img, qemu_info, qemu_io, raw_of
from fixtures.shadow import shadow_points

K = 1024
LINES = ["512k:A", "64k:- 64k:B 384k:-", "64k:C 64k:- 64k:c 320k:-", "256k:- 64k:D 192k:-"]
NAMES = ("base", "mid", "img", "top")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """base <- mid <- img <- top, in a directory of its own; img is led away."""
    return build(tmp_path / "d", LINES, NAMES)


@pytest.fixture
def image(disk: Disk) -> Path:
    return disk.paths[2]


def copy_of(source: Path, path: Path, fmt: str = "qcow2", *options: str) -> Path:
    """Another image that shows the same."""
    path.parent.mkdir(exist_ok=True)
    qemu_img("convert", "-f", format_of(source), "-O", fmt, *options, source, path)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """All files and work files; a directory is empty."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in directory.rglob("*")
    }


def led(image: Path, name: str, fmt: str) -> None:
    """The header of `image` names its backing file so, and the image is in order."""
    info = qemu_info(image)
    assert (info["backing-filename"], info["backing-filename-format"]) == (name, fmt)
    assert qemu_check(image) == {"corruptions": 0, "leaks": 0}


# --- the same content: only the header changes ----------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "options"),
    [("raw", ()), ("qcow2", ()), ("qcow2", ("-o", "cluster_size=4k")), ("qcow2", ("-c",)),
     ("qcow2", ("-o", "cluster_size=2M,extended_l2=on"))],
)  # fmt: skip
@pytest.mark.parametrize("place", ["d", "e"])
def test_another_chain_that_shows_the_same(
    disk: Disk, image: Path, tmp_path: Path, fmt: str, options: tuple[str, ...], place: str
) -> None:
    other = copy_of(disk.paths[1], tmp_path / place / "other", fmt, *options)
    before, others = contents(disk.directory), contents(other.parent)
    done = run("rebase", image, "--onto", other, "--yes", "--json")
    assert done.code == 0 and done.err == "", done.err
    name = "other" if place == "d" else "../e/other"
    assert done.json["identical"] and done.json["different_bytes"] == 0
    assert done.json["backing"] == {"name": name, "format": fmt}
    assert done.json["verified"]["identical"] is True
    assert done.json["verified"]["compared_bytes"] >= 320 * K
    led(image, name, fmt)
    after = contents(disk.directory)
    size = 65536  # of the header cluster
    assert after.pop(image.name)[size:] == before[image.name][size:]
    assert after == {each: before[each] for each in before if each != image.name}
    assert contents(other.parent)["other"] == others["other"]
    # What it backed on before is not needed any more.
    disk.paths[0].rename(tmp_path / "away")
    for path in disk.paths[2:]:
        assert raw_of(path) == disk.points[path.name]


def test_an_absolute_name_stays_absolute(disk: Disk, image: Path) -> None:
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", disk.paths[1], "-F", "qcow2", image)
    other = copy_of(disk.paths[1], disk.directory / "other.qcow2")
    assert run("rebase", image, "--onto", other, "--yes").code == 0
    led(image, str(other), "qcow2")
    assert raw_of(image) == disk.points[image.name]


def test_names_count_from_where_the_command_is_given(disk: Disk, tmp_path: Path) -> None:
    copy_of(disk.paths[1], tmp_path / "e" / "-o:1", "raw")
    done = command("rebase", "--onto", "./-o:1", "--yes", "../d/img.qcow2", cwd=tmp_path / "e")
    assert done.code == 0, done.err
    led(disk.paths[2], "../e/-o:1", "raw")
    assert raw_of(disk.paths[2]) == disk.points["img.qcow2"]


def test_what_differs_below_its_own_data_does_not_matter(disk: Disk, image: Path) -> None:
    other = copy_of(disk.paths[1], disk.directory / "other")
    qemu_io(other, [f"write -q -P 9 0 {64 * K}", f"write -q -P 9 {128 * K} {64 * K}"], "qcow2")
    assert run("rebase", image, "--onto", other, "--yes").code == 0
    led(image, "other", "qcow2")
    assert raw_of(image) == disk.points[image.name]


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [192 * K, 1024 * K])
def test_another_size(tmp_path: Path, fmt: str, size: int) -> None:
    """What is beyond the end of a shorter backing file reads as zeroes."""
    disk = build(tmp_path / "d", ["64k:A 448k:0", "64k:- 64k:B 384k:-"], ("base", "img"))
    other = disk.directory / "other"
    qemu_img("create", "-q", "-f", fmt, other, str(size))
    (tmp_path / "a").write_bytes(disk.points["base.qcow2"][: 64 * K])
    qemu_io(other, [f"write -q -s a 0 {64 * K}"], fmt, cwd=tmp_path)
    assert run("rebase", disk.active, "--onto", other, "--yes").code == 0
    led(disk.active, "other", fmt)
    assert raw_of(disk.active) == disk.points["img.qcow2"]


def test_again_there_is_nothing_to_do(disk: Disk, image: Path) -> None:
    before = contents(disk.directory)
    done = run("rebase", image, "--onto", disk.paths[1], "--yes")
    assert done.code == 0 and "nothing to do" in done.out
    assert contents(disk.directory) == before


def test_an_image_without_a_backing_file(tmp_path: Path) -> None:
    """A full copy of a clone becomes thin over its template again."""
    disk = build(tmp_path / "d", ["512k:A", "512k:A"], ("base", "clone"))
    full = copy_of(disk.active, disk.directory / "full")
    assert run("rebase", full, "--onto", disk.paths[0], "--yes").code == 0
    led(full, "base.qcow2", "qcow2")
    assert raw_of(full) == disk.points["clone.qcow2"]


# --- it differs -----------------------------------------------------------------------------


def differing(disk: Disk, path: Path, fmt: str = "qcow2") -> Path:
    """As mid, but for 4 KiB at 192K and 512 bytes at 448K (and where img hides it)."""
    other = copy_of(disk.paths[1], path, fmt)
    writes = [f"write -q -P 9 0 {64 * K}", f"write -q -P 9 {192 * K} 4k",
              f"write -q -P 9 {448 * K} 512"]  # fmt: skip
    qemu_io(other, writes, fmt)
    return other


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_what_differs_is_told(disk: Disk, image: Path, fmt: str) -> None:
    other = differing(disk, disk.directory / "other", fmt)
    before = contents(disk.directory)
    line = run("rebase", image, "--onto", other, "--yes").fails(1)
    assert f"{4 * K + 512} bytes differ" in line and f"offset {192 * K};" in line
    assert "--allow-copy" in line
    told = run("rebase", image, "--onto", other, "--yes", "--json")
    assert told.code == 1 and not told.json["identical"] and told.json["steps"] == []
    assert (told.json["different_bytes"], told.json["first_difference"]) == (4608, 192 * K)
    assert contents(disk.directory) == before


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("place", ["d", "e"])
def test_what_differs_is_pulled(
    disk: Disk, image: Path, tmp_path: Path, fmt: str, place: str
) -> None:
    other = differing(disk, tmp_path / place / "other", fmt)
    names = set(contents(disk.directory))
    untouched = other.read_bytes()
    clusters = -(-image.stat().st_size // (64 * K))
    done = run("rebase", image, "--onto", other, "--yes", "--allow-copy", "--json")
    assert done.code == 0, done.err
    assert done.json["verified"]["identical"] and done.json["verified"]["compared_bytes"] > 0
    led(image, "other" if place == "d" else "../e/other", fmt)
    assert set(contents(disk.directory)) == names and other.read_bytes() == untouched
    # Only the two clusters that differ came in.
    assert image.stat().st_size == (clusters + 2) * 64 * K
    disk.paths[0].rename(tmp_path / "away")
    for path in disk.paths[2:]:
        assert raw_of(path) == disk.points[path.name]


def test_zeroes_hide_what_another_one_has(tmp_path: Path) -> None:
    """An image that names nothing yet reads zeroes where the other one has data."""
    disk = build(tmp_path / "d", ["512k:A", "64k:A 64k:0 384k:A"], ("base", "clone"))
    full = copy_of(disk.active, disk.directory / "full")
    assert f"offset {64 * K}" in run("rebase", full, "--onto", disk.paths[0], "--yes").fails(1)
    done = run("rebase", full, "--onto", disk.paths[0], "--yes", "--allow-copy")
    assert done.code == 0, done.err
    led(full, "base.qcow2", "qcow2")
    assert raw_of(full) == disk.points["clone.qcow2"]
    assert {path.name for path in disk.directory.iterdir()} == {"base.qcow2", "clone.qcow2", "full"}


def test_an_image_of_its_own_chain(disk: Disk, image: Path) -> None:
    """mid is not needed by img any more, and stays."""
    assert run("rebase", image, "--onto", disk.paths[0], "--yes").code == 1
    assert run("rebase", image, "--onto", disk.paths[0], "--yes", "--allow-copy").code == 0
    led(image, "base.qcow2", "qcow2")
    disk.expect({path.name: path.name for path in disk.paths})


def test_a_sibling_of_what_it_backs_on(disk: Disk, image: Path) -> None:
    """Both chains end in the same base, which is the same place on both sides."""
    other = disk.directory / "other"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", other)
    told = run("rebase", image, "--onto", other, "--yes", "--json")
    # Of what mid has img hides nothing but 64 KiB from 64K on, which differ from the base.
    pairs = zip(*(disk.points[path.name][64 * K : 128 * K] for path in disk.paths[:2]), strict=True)
    assert (told.code, told.json["different_bytes"]) == (1, sum(a != b for a, b in pairs))
    assert told.json["compared_bytes"] == 64 * K
    assert run("rebase", image, "--onto", other, "--yes", "--allow-copy").code == 0
    led(image, "other", "qcow2")
    for path in disk.paths:
        assert raw_of(path) == disk.points[path.name]


def test_a_dry_run_is_what_is_done(disk: Disk, image: Path, tmp_path: Path) -> None:
    other = differing(disk, tmp_path / "e" / "other", "raw")
    before = contents(disk.directory)
    script = run("rebase", image, "--onto", other, "--allow-copy", "--dry-run")
    assert script.code == 0 and contents(disk.directory) == before
    subprocess.run(["sh", "-eu"], input=script.out, text=True, check=True, capture_output=True)
    led(image, "../e/other", "raw")
    disk.expect({path.name: path.name for path in disk.paths})


def test_nobody_is_there_to_be_asked(disk: Disk, image: Path) -> None:
    assert "--yes" in command("rebase", image, "--onto", disk.paths[0]).fails(2)


def test_options_of_reading(disk: Disk, image: Path, tmp_path: Path) -> None:
    """OTHER is named by the user; what it backs on is not."""
    other = build_chain(tmp_path / "f", LINES[:1], ["low"]).active
    above = tmp_path / "e" / "other"
    above.parent.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "-b", other, "-F", "qcow2", above)
    assert "--allow" in run("rebase", image, "--onto", above, "--yes", "--allow-copy").fails(4)
    args = ("--yes", "--allow-copy", "--allow", tmp_path / "f")
    assert run("rebase", image, "--onto", above, *args).code == 0
    assert raw_of(image) == disk.points["img.qcow2"]


def test_a_raw_image_that_looks_like_another_one(tmp_path: Path) -> None:
    """A guest may have written a qcow2 header into its raw disk: --onto-format says what it is."""
    disk = build(tmp_path / "d", ["512k:A", "64k:B 448k:-"], ("base", "img"))
    raw = copy_of(disk.paths[0], disk.directory / "raw", "raw")
    with raw.open("r+b") as file:
        file.write(disk.paths[0].read_bytes()[: 64 * K])
    args = ("--onto-format", "raw", "--yes")
    assert run("rebase", disk.active, "--onto", raw, *args).code == 0
    led(disk.active, "raw", "raw")
    assert raw_of(disk.active) == disk.points["img.qcow2"]


# --- any two chains -------------------------------------------------------------------------


def full_enough(specs: list[LayerSpec]) -> bool:
    """Whether it says enough to differ from another one."""
    written = [each for spec in specs for one in spec.passes for each in one if each.letter]
    return len(written) >= 2


@settings(
    max_examples=25 if "QCHAIN_TORTURE" not in os.environ else 1500, deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much
    ],
)  # fmt: skip
@given(
    mine=chains(min_layers=1, max_layers=4).filter(lambda each: each[-1].format == "qcow2"),
    theirs=chains(min_layers=1, max_layers=3).filter(full_enough),
    pick=st.tuples(st.integers(0, 3), st.integers(0, 6)),
)
def test_every_image_reads_as_before(
    mine: list[LayerSpec], theirs: list[LayerSpec], pick: tuple[int, int]
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        ours = build_chain(directory, mine, [f"m{n}" for n in range(len(mine))])
        others = build_chain(directory, theirs, [f"t{n}" for n in range(len(theirs))])
        paths = [*ours.paths, *others.paths]
        points = dict(zip(paths, [*shadow_points(mine), *shadow_points(theirs)], strict=True))
        qcow2 = [path for path in ours.paths if format_of(path) == "qcow2"]
        image = qcow2[pick[0] % len(qcow2)]
        # What is below it, or of the other chain; nothing that backs on it.
        choice = [*others.paths, *ours.paths[: ours.paths.index(image)]]
        other = choice[pick[1] % len(choice)]
        before = contents(directory)
        asked = run("rebase", image, "--onto", other, "--yes")
        assert asked.code in (0, 1), asked.err
        event(f"exit {asked.code}, {format_of(other)}")
        if asked.code == 1:
            assert contents(directory) == before
            # It is true: re-pointed all the same, it would read otherwise.
            shutil.copytree(directory, directory / "copy")
            there = directory / "copy" / image.name
            argv = ["rebase", "-u", "-f", "qcow2", "-b", other.name, "-F", format_of(other)]
            qemu_img(*argv, there)
            assert raw_of(there) != points[image]
            shutil.rmtree(directory / "copy")
            done = run("rebase", image, "--onto", other, "--yes", "--allow-copy")
            if done.code == 3 and "compat 0.10 and no backing" in done.err:
                assert contents(directory) == before
                return
            assert done.code == 0, done.err
        assert sorted(contents(directory)) == sorted(before)
        led(image, other.name, format_of(other))
        for path in paths:
            assert raw_of(path, format_of(path)) == points[path], path.name
            if path != image:
                assert path.read_bytes() == before[path.name]


# --- refused --------------------------------------------------------------------------------


def refused(disk: Disk, image: Path, other: Path, words: str, *more: str) -> None:
    before = contents(disk.directory)
    for extra in ((), ("--allow-copy",)):
        line = run("rebase", image, "--onto", other, "--yes", *extra, *more).fails(3)
        assert words in line, line
    assert contents(disk.directory) == before


def test_loops(disk: Disk, image: Path) -> None:
    refused(disk, image, disk.active, "would loop")
    refused(disk, image, image, "cannot back on itself")
    (disk.directory / "again").symlink_to(image)
    refused(disk, image, disk.directory / "again", "cannot back on itself")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: set_feature(path, 0), "not closed properly"),
        (lambda path: set_feature(path, 1), "corrupt"),
        (snapshot, "internal snapshot"),
        (linked, "hard links"),
        (moved_behind_a_link, "symbolic link"),
        (unrecord_format, "format"),
    ],
)
def test_an_image_that_is_not_fit(disk: Disk, image: Path, spoil: object, words: str) -> None:
    other = copy_of(disk.paths[1], disk.directory / "other")
    spoil(image)  # type: ignore[operator]
    refused(disk, image, other, words)


def test_another_image_that_is_not_fit(disk: Disk, image: Path) -> None:
    other = copy_of(disk.paths[1], disk.directory / "other")
    link = disk.directory / "link"
    link.symlink_to(other)
    refused(disk, image, link, "symbolic link")
    set_feature(other, 1)
    refused(disk, image, other, "corrupt")
    locked = disk.directory / "locked"
    options = "encrypt.format=aes,encrypt.key-secret=s"
    argv = ["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o", options]
    qemu_img(*argv, locked, "512k")
    refused(disk, image, locked, "encrypted")


def test_a_raw_image_has_no_header(disk: Disk) -> None:
    raw = copy_of(disk.paths[0], disk.directory / "raw", "raw")
    refused(disk, raw, disk.paths[0], "is raw")


def test_no_file(disk: Disk, image: Path) -> None:
    assert "none" in run("rebase", image, "--onto", disk.directory / "none", "--yes").fails(4)
    assert "none" in run("rebase", disk.directory / "none", "--onto", image, "--yes").fails(4)


@pytest.fixture
def in_use() -> Iterator[object]:
    """A qemu that has an image open for writing."""
    running: list[subprocess.Popen[str]] = []

    def use(path: Path, *flags: str) -> None:
        argv = ["qemu-io", *flags, "-f", format_of(path), str(path)]
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        running.append(process)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("length\n")
        assert process.stdout.readline()

    yield use
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize("which", ["img.qcow2", "top.qcow2", "base.qcow2", "other"])
def test_in_use(disk: Disk, image: Path, in_use: object, which: str) -> None:
    other = copy_of(disk.paths[1], disk.directory / "other")
    in_use(disk.directory / which)  # type: ignore[operator]
    # A guest at top reads img.
    words = "in use by"
    refused(disk, image, other, words)
    refused(disk, image, other, words, "-U")


def test_a_reader_of_the_other_one_is_welcome(disk: Disk, image: Path, in_use: object) -> None:
    other = copy_of(disk.paths[1], disk.directory / "other")
    in_use(other, "-r")  # type: ignore[operator]
    assert run("rebase", image, "--onto", other, "--yes").code == 0
    led(image, "other", "qcow2")


def test_overlays_of_the_image_do_not_matter(tmp_path: Path) -> None:
    """They read as before, whoever they are."""
    tree = {
        "base": (None, "512k:A"), "img": ("base", "64k:B"), "x": ("img", "64k:- 64k:C"),
        "y": ("img", "128k:- 64k:C"), "other": (None, "64k:- 128k:A 320k:B"),
    }  # fmt: skip
    disk = grown(tmp_path / "d", tree)  # type: ignore[arg-type]
    paths = {path.stem: path for path in disk.paths}
    done = run("rebase", paths["img"], "--onto", paths["other"], "--yes", "--allow-copy")
    assert done.code == 0, done.err
    led(paths["img"], "other.qcow2", "qcow2")
    disk.expect({path.name: path.name for path in disk.paths})


def test_no_space(disk: Disk, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = differing(disk, disk.directory / "other")
    real = os.statvfs

    def full(path: object) -> os.statvfs_result:
        told = list(real(path))  # type: ignore[call-overload]
        told[4] = 0  # f_bavail
        return os.statvfs_result(told)

    monkeypatch.setattr(os, "statvfs", full)
    line = run("rebase", image, "--onto", other, "--yes", "--allow-copy").fails(3)
    assert "bytes there and 0 are free" in line


def test_no_room_for_the_name(tmp_path: Path) -> None:
    """Of a header in a cluster of 512 bytes."""
    disk = build(tmp_path / "d", ["64k:A", "[cluster=512] 64k:-"], ("base", "img"))
    away = tmp_path / ("n" * 200) / ("m" * 200)
    away.mkdir(parents=True)
    other = copy_of(disk.paths[0], away / "other")
    refused(disk, disk.active, other, "no room for a backing name")
