"""The check of one image: judged by `qemu-img check`, over images damaged in every way.

`QCHAIN_DAMAGED` in the environment: how many damaged images (default 600), the seeds are counted
up from `QCHAIN_SEED` (default 0). `make damaged` takes thousands, all processors share them.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fixtures.bigmeta import write_metadata_image
from fixtures.build import build_layer
from fixtures.damage import damage
from fixtures.language import as_spec, resolve_size
from fixtures.oracle import qemu_img
from fixtures.shapes import build_singles
from qchain.errors import ImageError, Unsupported
from qchain.hostfile import HostFile
from qchain.qcow2.check import CheckReport, Finding, check_image
from qchain.qcow2.check.kinds import MEANINGS
from qchain.qcow2.header import read_header

COUNT = int(os.environ.get("QCHAIN_DAMAGED", "600"))
FIRST_SEED = int(os.environ.get("QCHAIN_SEED", "0"))
PARTS = max(1, COUNT // 300)
COPIED, COMPRESSED = 1 << 63, 1 << 62


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return build_singles(tmp_path_factory.mktemp("shapes"))


@dataclass(frozen=True)
class Verdict:
    """What qemu-img check says; None for all of it if it does not come to a verdict."""

    corruptions: int | None
    leaks: int | None
    text: str

    @property
    def corrupt(self) -> bool:
        return self.corruptions != 0


def judge(image: Path, *options: str) -> Verdict:
    """`qemu-img check`. An error within the check (a table it cannot read) is a corruption."""
    words = ["qemu-img", "check", "--output=json", *(options or ("-f", "qcow2", str(image)))]
    done = subprocess.run(words, capture_output=True, timeout=60)
    text = done.stderr.decode("utf-8", "replace")
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return Verdict(None, None, text)
    corruptions = found.get("corruptions", 0) + found.get("check-errors", 0)
    return Verdict(corruptions, found.get("leaks", 0), text)


def check(image: Path, limit: int = 1000) -> CheckReport:
    with HostFile(image) as file:
        return check_image(file, read_header(file), limit=limit)


def disagreement(image: Path) -> tuple[str, str | None]:
    """(what both say, or that they do not agree; the disagreement)."""
    verdict = judge(image)
    try:
        report = check(image)
    except ImageError as error:
        assert "\n" not in str(error)
        if re.search("L1 table ends at [0-9]+, beyond the file", error.why):
            # To qemu the rest of the table is zeroes: the disk is empty there, and sound.
            return "stricter", None
        good = verdict.corrupt
        return "refused", None if good else f"refused ({error}), qemu finds nothing wrong"
    assert_sound(report, image)
    if verdict.corruptions is None:
        # Flag bit 2 of a bitmap is in the specification, but qemu does not take it.
        good = not report.clean or "doesn't satisfy the constraints" in verdict.text
        return "qemu refuses", None if good else f"clean; qemu: {verdict.text}"
    if verdict.corrupt != bool(report.corruptions):
        return "differ", f"corruptions {report.counts}, qemu {verdict}"
    if verdict.leaks != report.leaks:
        return "differ", f"leaks {report.leaks}, qemu {verdict.leaks}"
    return "corrupt" if verdict.corrupt else "leaks" if report.leaks else "clean", None


def assert_sound(report: CheckReport, image: Path) -> None:
    """What holds for every report."""
    severities = Counter[str]()
    for kind, count in report.counts.items():
        severities[MEANINGS[kind][0].value] += count
    assert severities["corruption"] == report.corruptions
    assert severities["leak"] == report.leaks
    assert severities["suspicion"] == report.suspicions
    assert {each.kind for each in report.problems} == set(report.counts)
    for each in report.problems:
        assert each.meaning.endswith(".") and "{" not in each.meaning and each.offset >= 0
    ends = [0]
    for start, length in report.leaked:
        assert start > ends[-1] and length > 0, "in order, and neighbours joined"
        ends.append(start + length)


def test_sound_images_are_clean(shapes: dict[str, bytes], tmp_path: Path) -> None:
    for name, raw in shapes.items():
        image = tmp_path / "image"
        image.write_bytes(raw)
        verdict = judge(image)
        assert (verdict.corruptions, verdict.leaks) == (0, 0), (name, verdict)
        assert check(image).clean, name


@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_images_agree_with_qemu(
    part: int, shapes: dict[str, bytes], tmp_path: Path
) -> None:
    names = sorted(shapes)
    outcomes: Counter[str] = Counter()
    wrong = []
    image = tmp_path / "image"
    seeds = range(FIRST_SEED + part, FIRST_SEED + COUNT, PARTS)
    for seed in seeds:
        name = names[seed % len(names)]
        raw, what = damage(shapes[name], seed, header=seed % 5 == 0)
        image.write_bytes(raw)
        started = time.process_time()
        outcome, why = disagreement(image)
        assert time.process_time() - started < 2, (seed, name, what)
        outcomes[outcome] += 1
        if why:
            wrong.append(f"seed {seed}, {name}: {what}: {why}")
    assert not wrong, "\n".join(wrong)
    assert outcomes["stricter"] < 0.02 * len(seeds), outcomes
    # Damage that nobody notices, or that nobody can open, would prove nothing.
    for outcome, share in {"corrupt": 0.4, "leaks": 0.02, "clean": 0.02}.items():
        assert outcomes[outcome] >= share * len(seeds), outcomes


# --- one kind of damage at a time ------------------------------------------------------


class Poked:
    """An image of 64 KiB clusters, to be changed by hand: places found with `struct` alone."""

    def __init__(self, raw: bytes, path: Path) -> None:
        self.raw, self.path = bytearray(raw), path
        self.cluster = 1 << self.u(20, 4)
        self.l1 = self.u(40, 8)
        self.l2 = self.u(self.l1, 8) & 0x00FFFFFFFFFFFE00
        table = self.u(48, 8)
        self.block = self.u(table, 8)

    def u(self, offset: int, width: int) -> int:
        return int.from_bytes(self.raw[offset : offset + width], "big")

    def set(self, offset: int, value: int, width: int = 8) -> None:
        self.raw[offset : offset + width] = value.to_bytes(width, "big")

    def entry(self, index: int, width: int = 8) -> int:
        return self.u(self.l2 + index * width, 8)

    def refcount(self, host: int, value: int) -> None:
        """16-bit refcounts, all in the first block."""
        self.set(self.block + host // self.cluster * 2, value, 2)

    def report(self, limit: int = 1000) -> CheckReport:
        self.path.write_bytes(self.raw)
        what, why = disagreement(self.path)
        assert why is None, (what, why)
        return check(self.path, limit)

    def finds(self, kind: str) -> Finding:
        """The first finding of this kind."""
        report = self.report()
        found = [each for each in report.problems if each.kind == kind]
        assert found, report
        return found[0]


HOST = 0x00FFFFFFFFFFFE00


@pytest.fixture
def poke(tmp_path: Path) -> Callable[[str], Poked]:
    def make(line: str) -> Poked:
        path = tmp_path / "poked.qcow2"
        spec = as_spec(line)
        build_layer(path, spec, resolve_size(spec, None))
        return Poked(path.read_bytes(), path)

    return make


PLAIN = "[cluster=64k size=16M] 256k:A 64k:- 64k:B"


def test_leaked_clusters_are_ranges(poke: Callable[[str], Poked]) -> None:
    image = poke(PLAIN)
    end = len(image.raw)
    image.raw += bytes(4 * image.cluster)
    for index in (0, 1, 3):
        image.refcount(end + index * image.cluster, 1)
    image.refcount(image.entry(0) & HOST, 2)  # a leak, but the cluster is in use
    report = image.report()
    assert report.leaks == 4
    size = image.cluster
    assert report.leaked == [(end, 2 * size), (end + 3 * size, size)]
    assert [(each.offset, each.length) for each in report.problems if each.kind == "leak"][1:] == [
        (end, 2 * size),
        (end + 3 * size, size),
    ]


def test_too_low_refcount(poke: Callable[[str], Poked]) -> None:
    image = poke(PLAIN)
    host = image.entry(2) & HOST
    image.refcount(host, 0)
    assert image.finds("refcount-too-low").offset == host
    # The flag no longer says the truth either: guest cluster 2.
    assert image.finds("copied-wrong").guest == 2 * image.cluster


def test_copied_flag_missing(poke: Callable[[str], Poked]) -> None:
    image = poke(PLAIN)
    image.set(image.l2 + 5 * 8, image.entry(5) & ~COPIED)
    found = image.finds("copied-missing")
    assert (found.offset, found.guest) == (image.l2 + 5 * 8, 5 * image.cluster)
    image = poke(PLAIN)
    image.set(image.l1, image.l2)
    assert image.finds("copied-missing").offset == image.l1


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda image: image.entry(1) | 2, "l2-reserved"),
        (lambda image: image.entry(1) + 512, "l2-unaligned"),
        (lambda image: len(image.raw) | COPIED, "l2-outside"),
        (lambda image: 1 << 50 | COPIED, "l2-outside"),
        (lambda image: COMPRESSED | 1 << 40, "l2-outside"),
        (lambda image: COPIED | COMPRESSED | image.entry(1) & HOST, "compressed-copied"),
    ],
)
def test_bad_l2_entries(
    poke: Callable[[str], Poked], value: Callable[[Poked], int], kind: str
) -> None:
    image = poke(PLAIN)
    image.set(image.l2 + 8, value(image))
    found = image.finds(kind)
    assert (found.offset, found.guest) == (image.l2 + 8, image.cluster)


def test_unaligned_data_uses_both_clusters_that_it_touches(poke: Callable[[str], Poked]) -> None:
    image = poke(PLAIN)
    image.set(image.l2 + 8, image.entry(1) + 512)
    image.set(image.l2 + 2 * 8, 0)
    assert image.report().leaks == 0
    image.set(image.l2 + 8, 0)
    assert image.report().leaks == 2


def test_bad_l1_entries(poke: Callable[[str], Poked]) -> None:
    for value, kind in (
        (COPIED | 1 << 60, "l1-reserved"),
        (COPIED | 1 << 40, "l1-outside"),
        (COPIED, "l1-no-table"),
    ):
        image = poke(PLAIN)
        image.set(image.l1, value)
        assert image.finds(kind).offset == image.l1
    image = poke(PLAIN)
    image.set(image.l1, COPIED | image.l2 + 512)
    assert image.finds("l1-unaligned").offset == image.l1


@pytest.mark.parametrize("content", ["text", "noise"])
def test_l2_table_overwritten(poke: Callable[[str], Poked], content: str) -> None:
    image = poke("[cluster=4k size=8M] 4M:- 256k:A")
    second = image.u(image.l1 + 2 * 8, 8) & HOST
    body = b"Dear customer, \n" if content == "text" else os.urandom(4096)
    image.raw[second : second + image.cluster] = (body * image.cluster)[: image.cluster]
    found = image.finds("l2-implausible")
    assert (found.offset, found.length, found.guest) == (second, image.cluster, 4 << 20)
    # One line for the table, not one for each of its 512 entries.
    kinds = Counter(each.kind for each in image.report().problems)
    assert kinds["l2-implausible"] == 1 and kinds["l2-reserved"] == 0


def test_overlap_that_qemu_passes_over(poke: Callable[[str], Poked]) -> None:
    """A guest cluster that lies on its own L2 table, with refcounts and flags to match."""
    image = poke(PLAIN)
    image.set(image.l2 + 6 * 8, image.l2)
    image.set(image.l1, image.l2)
    image.refcount(image.l2, 2)
    report = image.report()
    assert (report.corruptions, report.leaks, report.suspicions) == (0, 0, 1)
    (found,) = report.problems
    assert (found.kind, found.offset) == ("overlap", image.l2)
    assert "L2 table and data" in found.meaning


def test_zero_flag_in_version_2(poke: Callable[[str], Poked]) -> None:
    image = poke("[cluster=64k v2 size=16M] 256k:A")
    image.set(image.l2 + 8, image.entry(1) | 1)
    report = image.report()
    assert report.corruptions == 0 and not report.clean
    assert report.problems[0].kind == "zero-flag-v2"
    assert report.problems[0].guest == image.cluster


def test_subclusters(poke: Callable[[str], Poked]) -> None:
    line = "[ext cluster=64k size=16M] 128k:A 64k:c"
    for index, word, kind in (
        (0, 1 << 40 | 0xFFFFFFFF, "subcluster-conflict"),
        (2, 1, "compressed-bitmap"),
        (9, 4, "subcluster-without-cluster"),
    ):
        image = poke(line)
        image.set(image.l2 + index * 16 + 8, word)
        found = image.finds(kind)
        assert (found.offset, found.guest) == (image.l2 + index * 16, index * image.cluster)
    image = poke(line)
    image.set(image.l2, image.entry(0) | 1)
    assert image.report().counts == {"zero-flag-extended": 1}


def test_refcount_structures(poke: Callable[[str], Poked]) -> None:
    table = 48
    for value, kind in (
        (lambda image: image.block | 8, "refcount-table-reserved"),
        (lambda image: image.block + 512, "refcount-block-unaligned"),
        (lambda image: 1 << 40, "refcount-block-outside"),
        (lambda image: (1 << 64) - image.cluster, "refcount-block-outside"),
        (lambda image: image.l2, "refcount-block-shared"),
    ):
        image = poke(PLAIN)
        place = image.u(table, 8)
        image.set(place, value(image))
        assert image.finds(kind).offset == (image.l2 if kind.endswith("shared") else place)
    image = poke(PLAIN)
    image.set(table, 1 << 30)
    assert image.finds("outside").offset == 1 << 30


def test_refcount_overflow(poke: Callable[[str], Poked]) -> None:
    image = poke("[cluster=64k refcount=1 size=16M] 256k:A")
    image.set(image.l2 + 8, image.entry(0))
    assert image.finds("refcount-overflow").offset == image.entry(0) & HOST


def test_snapshots(poke: Callable[[str], Poked]) -> None:
    for field, width, value, kind in (
        (0, 8, 512, "snapshot-l1"),
        (0, 8, 1 << 40, "outside"),
        (8, 4, (32 << 20) // 8 + 1, "snapshot-l1"),
        (36, 4, 8, "snapshot-incomplete"),
        (36, 4, 2000, "snapshot-table"),
    ):
        image = poke(PLAIN)
        qemu_img("snapshot", "-c", "one", image.path)
        image = Poked(image.path.read_bytes(), image.path)
        image.set(image.u(64, 8) + field, value, width)
        assert image.finds(kind)


def test_more_snapshots_than_the_file_holds(poke: Callable[[str], Poked]) -> None:
    image = poke(PLAIN)
    qemu_img("snapshot", "-c", "one", image.path)
    image = Poked(image.path.read_bytes(), image.path)
    image.set(60, 1000, 4)
    assert image.report().counts["snapshot-incomplete"] == 999


def test_bitmaps(poke: Callable[[str], Poked]) -> None:
    image = poke(PLAIN)
    qemu_img("bitmap", "--add", image.path, "one")
    image = Poked(image.path.read_bytes(), image.path)
    place = image.raw.index(struct.pack(">II", 0x23852875, 24)) + 8
    directory = image.u(place + 16, 8)
    table = image.u(directory, 8)
    image.set(table, 1 << 60)
    assert image.finds("bitmap-table-entry").offset == table
    image = Poked(image.raw, image.path)
    image.set(directory + 16, 7, 1)
    assert image.finds("bitmap-directory").offset == directory


def test_stale_bitmaps_are_leaks(poke: Callable[[str], Poked]) -> None:
    image = poke(PLAIN)
    qemu_img("bitmap", "--add", image.path, "one")
    image = Poked(image.path.read_bytes(), image.path)
    image.set(88, 0)
    assert image.report().leaks == 2


def test_data_file(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    spec = as_spec("[cluster=64k datafile size=16M] 256k:A")
    build_layer(path, spec, 16 << 20)
    image = Poked(path.read_bytes(), path)
    assert image.report().clean
    image.set(image.l2 + 8, image.entry(1) & ~COPIED)
    assert image.finds("copied-missing").guest == image.cluster
    image = Poked(image.raw, path)
    image.set(image.l2 + 8, COMPRESSED)
    assert image.finds("compressed-data-file").guest == image.cluster


def test_luks(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    secret = ("--object", "secret,id=s,data=abc")
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", options, path, "16M")
    wanted = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    verdict = judge(path, *secret, "--image-opts", wanted)
    assert (verdict.corruptions, verdict.leaks) == (0, 0), verdict
    assert check(path).clean
    image = Poked(path.read_bytes(), path)
    header = image.u(image.raw.index(struct.pack(">II", 0x0537BE77, 16)) + 8, 8)
    image.refcount(header + image.cluster, 2)
    image.refcount(header + 2 * image.cluster, 0)
    path.write_bytes(image.raw)
    verdict = judge(path, *secret, "--image-opts", wanted)
    report = check(path)
    assert verdict.corrupt and verdict.leaks == report.leaks == 1
    assert report.counts == {"leak": 1, "refcount-too-low": 1}


def test_marked_corrupt(poke: Callable[[str], Poked]) -> None:
    image = poke(PLAIN)
    image.set(72, 2)
    assert image.report().counts == {"header": 1}
    image.set(72, 0)
    image.set(88, 2)  # a raw data file, but no data file
    assert image.report().counts == {"header": 1}


def test_limit_cuts_the_list_not_the_counts(poke: Callable[[str], Poked]) -> None:
    image = poke("[cluster=512 size=64k] 32k:A")
    for index in range(0, 60, 2):
        image.set(image.l2 + index * 8, image.entry(index) & ~COPIED)
    full, cut = image.report(), image.report(limit=3)
    assert full.counts == cut.counts == {"copied-missing": 30}
    assert len(full.problems) == 30 and cut.problems == full.problems[:3]


# --- size --------------------------------------------------------------------------------


def test_windows_of_host_clusters(
    shapes: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted piece by piece, the result is the same."""
    image = tmp_path / "image"
    seen = Counter[str]()
    for seed in range(60):
        name = sorted(shapes)[seed % len(shapes)]
        image.write_bytes(damage(shapes[name], seed, header=False)[0])
        try:
            whole = check(image)
        except ImageError:
            continue
        with monkeypatch.context() as patch:
            for module in ("check", "l2"):
                patch.setattr(f"qchain.qcow2.check.{module}.WINDOW", 16)
            parts = check(image)
        assert (parts.corruptions, parts.leaks, parts.suspicions) == (
            whole.corruptions,
            whole.leaks,
            whole.suspicions,
        )
        assert parts.leaked == whole.leaked
        seen["corrupt" if whole.corruptions else "leaks" if whole.leaks else "clean"] += 1
    assert seen["corrupt"] > 10 and seen["leaks"]


def test_huge_sparse_file_costs_little(shapes: dict[str, bytes], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(shapes["512"])
    os.truncate(image, 20 << 30)
    tracemalloc.start()
    started = time.process_time()
    try:
        assert check(image).clean
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 250 << 20
    assert time.process_time() - started < 5
    os.truncate(image, 2 << 40)
    with pytest.raises(Unsupported, match="too many"):
        check(image)


def test_tables_reached_by_many_ways_cost_little(tmp_path: Path) -> None:
    """4 million L1 entries for one L2 table, whose entries all lead to one cluster."""
    image = tmp_path / "image"
    write_metadata_image(image, 1 << 30, 65536, 1.0, 1)
    with image.open("r+b") as file:
        raw = file.read(1 << 20)
        poked = Poked(raw, image)
        end = image.stat().st_size
        entry = poked.entry(0)
        file.seek(end)
        file.write(struct.pack(">Q", poked.l2 | COPIED) * (4 << 20))
        file.seek(poked.l2)
        file.write(struct.pack(">Q", entry) * 8192)
        file.seek(36)
        file.write(struct.pack(">IQ", 4 << 20, end))
    started = time.process_time()
    report = check(image)
    assert report.counts["refcount-too-low"]
    assert time.process_time() - started < 5


def test_large_image(tmp_path: Path) -> None:
    """A 1 TiB image of scattered data: quick, and in bounded memory."""
    image = tmp_path / "image"
    made = write_metadata_image(image, 1 << 40, 1 << 21, 0.5, 1, order="random")
    assert made.allocated_clusters > 200_000
    started = time.process_time()
    report = check(image)
    assert report.clean and report.clusters > made.allocated_clusters
    assert time.process_time() - started < 5


# --- the command ---------------------------------------------------------------------------


def run(*arguments: str | Path) -> tuple[int, str]:
    from qchain_cli.check import check as command

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_command(poke: Callable[[str], Poked]) -> None:
    image = poke(PLAIN)
    code, out = run("--json", image.path)
    found = json.loads(out)
    assert code == 0
    assert (found["corruptions"], found["leaks"], found["problems"]) == (0, 0, [])
    assert run(image.path)[1].startswith("consistent")
    host = image.entry(2) & HOST
    image.refcount(host, 0)
    image.path.write_bytes(image.raw)
    code, out = run("--json", image.path)
    found = json.loads(out)
    assert code == 1 and found["corruptions"] == 2
    assert {"kind", "offset", "meaning"} <= set(found["problems"][0])
    code, out = run(image.path)
    assert code == 1 and str(host) in out and "refcount-too-low" in out


def test_command_refuses_raw(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(4096))
    with pytest.raises(Unsupported, match="nothing to check"):
        run(raw)
