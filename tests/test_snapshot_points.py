"""Internal snapshots as points of their own: what `qemu-img convert -l` reads of each."""

from __future__ import annotations

import hashlib
import shutil
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_runner import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.build import build_chain
from fixtures.oracle import QemuError, qemu_check, qemu_img, qemu_info, qemu_io, raw_of
from fixtures.shadow import pattern
from qchain.chain.chain import open_chain
from qchain.chain.digest import digest
from qchain.chain.reader import pieces, read
from qchain.errors import ImageError
from qchain.hostfile import HostFile
from qchain.qcow2.header import read_header
from qchain.qcow2.snapshots import Snapshot, find_snapshot, read_snapshots
from qchain.verify.compare import compare


def ours(image: Path, snapshot: str | None = None) -> bytes:
    with open_chain(image, snapshot=snapshot) as chain:
        content = read(chain.layers, 0, chain.size)
        assert len(content) == chain.size
        whole = b"".join(
            bytes(piece.length) if piece.data is None else piece.data.tobytes()
            for piece in pieces(chain.layers)
        )
        assert whole == content
        assert digest(chain.layers) == hashlib.sha256(content).hexdigest()
    return content


def judged(image: Path, snapshot: str, key: str = "name") -> bytes:
    """The snapshot as qemu-img reads it, found by its name or its id."""
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", "-l", f"snapshot.{key}={snapshot}",
                 image, raw)  # fmt: skip
        return raw.read_bytes()


def reverted(image: Path, snapshot: str) -> bytes:
    """The snapshot as qemu makes it live again, its size included, in a copy beside the image."""
    copy = image.with_name("reverted")
    shutil.copyfile(image, copy)
    qemu_img("snapshot", "-a", snapshot, copy)
    content = raw_of(copy)
    copy.unlink()
    return content


def put(image: Path, letter: str, start: int, length: int, options: str = "") -> None:
    """Write a run of the shadow model's pattern."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "p").write_bytes(pattern(letter, start, length))
        qemu_io(image, [f"write -q {options} -s p {start} {length}"], "qcow2", cwd=Path(scratch))


def take(image: Path, name: str) -> None:
    qemu_img("snapshot", "-c", name, image)


def snapshots(image: Path) -> list[Snapshot]:
    with HostFile(image) as file:
        return read_snapshots(file, read_header(file))


def assert_points(image: Path, names: Sequence[str]) -> list[bytes]:
    """Every snapshot and the live content read as qemu reads them; returns the snapshots'."""
    contents = []
    for name in names:
        expected = reverted(image, name)
        assert ours(image, name) == expected, name
        # convert -l reads every snapshot at today's size: of another size it has a part.
        seen = judged(image, name)
        assert seen[: len(expected)] == expected[: len(seen)], name
        contents.append(expected)
    assert ours(image) == raw_of(image)
    return contents


SHAPES = {
    "v3": "",
    "v2": "v2",
    "small clusters": "cluster=512",
    "large clusters": "cluster=2M",
    "extended": "ext",
    "zstd": "zstd",
    "refcounts of 4 bits": "refcount=4",
    "v2, small": "v2 cluster=4k",
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backed", [False, True])
def test_points(shape: str, backed: bool, tmp_path: Path) -> None:
    layers = ["[size=5M] 2M:Z 1M:y 1k:X"] if backed else []
    image = build_chain(tmp_path, [*layers, f"[{SHAPES[shape]} size=5M] 70k:A 58k:-"]).active
    take(image, "one")
    put(image, "B", 30 << 10, 100 << 10)
    put(image, "C", 4 << 20, 1024)
    take(image, "two")
    qemu_io(image, ["write -q -z 0 128k", "discard -q 4M 1M", "write -q -z -u 2M 64k"], "qcow2")
    contents = assert_points(image, ["one", "two"])
    assert contents[0] != contents[1]
    assert contents[0][:4096] == pattern("A", 0, 4096)
    assert contents[1][64 << 10 : 65 << 10] == pattern("B", 64 << 10, 1024)
    take(image, "three")
    if not backed:
        put(image, "d", 2 << 20, 2 << 20, "-c")
    assert_points(image, ["one", "two", "three"])


@pytest.mark.parametrize("version", ["1.1", "0.10"])
def test_snapshots_of_other_sizes(version: str, tmp_path: Path) -> None:
    """The disk has grown, and been cut, since: each point has the size that it had.

    So does qemu's `snapshot -a`, while `convert -l` reads all of them at today's size.
    In version 2 nothing may be resized while there are snapshots.
    """
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={version}", image, "1M")
    put(image, "A", (1 << 20) - 4096, 4096)
    take(image, "small")
    if version == "0.10":
        with pytest.raises(QemuError, match="resize"):
            qemu_img("resize", "-q", image, "9M")
        assert_points(image, ["small"])
        return
    qemu_img("resize", "-q", image, "9M")
    put(image, "B", 8 << 20, 65536)
    take(image, "large")
    qemu_img("resize", "-q", "--shrink", image, "3M")
    put(image, "C", 0, 65536)
    take(image, "middle")
    qemu_img("resize", "-q", image, "4M")
    contents = assert_points(image, ["small", "large", "middle"])
    assert [len(each) >> 20 for each in contents] == [1, 9, 3]
    assert [each.disk_size >> 20 for each in snapshots(image)] == [1, 9, 3]


def test_grown_over_a_backing_file(tmp_path: Path) -> None:
    """A point larger than its backing file, and one that is smaller."""
    image = build_chain(tmp_path, ["[cluster=4k] 3M:A 1k:B", "[size=1M] 64k:C"]).active
    take(image, "small")
    qemu_img("resize", "-q", image, "8M")
    take(image, "large")
    put(image, "D", 5 << 20, 4096)
    contents = assert_points(image, ["small", "large"])
    assert [len(each) >> 20 for each in contents] == [1, 8]
    # qemu grows a disk by zeroes, not by what the backing file has there.
    assert not any(contents[1][1 << 20 :])


def test_the_backing_file_stays_todays(tmp_path: Path) -> None:
    """A snapshot records no backing file: a flattened image's old points lose it."""
    image = build_chain(tmp_path, ["1M:A", "64k:B"]).active
    take(image, "one")
    qemu_img("rebase", "-b", "", image)
    contents = assert_points(image, ["one"])
    assert contents[0][65536:] == bytes((1 << 20) - 65536)


def test_a_snapshot_belongs_to_the_active_image(tmp_path: Path) -> None:
    """The name is looked for in the image itself, never below; below, the live content is read."""
    chain = build_chain(tmp_path, ["64k:A", "64k:-"])
    take(chain.base, "one")
    with pytest.raises(ImageError, match="no snapshot 'one'; it has: none"):
        ours(chain.active, "one")
    take(chain.active, "two")
    put(chain.base, "B", 0, 512)
    put(chain.active, "C", 1024, 512)
    found = ours(chain.active, "two")
    assert found == judged(chain.active, "two")
    assert found[:512] == pattern("B", 0, 512)
    assert ours(chain.base, "one") == pattern("A", 0, 65536) == judged(chain.base, "one")


# --- names and ids ---------------------------------------------------------------------------


def test_ids_and_names(tmp_path: Path) -> None:
    """qemu counts ids up and lets names be the ids of others; an id is meant before a name."""
    image = build_chain(tmp_path, ["[size=1M] 64k:A"]).active
    take(image, "2")  # id 1
    put(image, "B", 0, 65536)
    take(image, "1")  # id 2
    put(image, "C", 0, 65536)
    take(image, "später ;:$ %")  # id 3
    assert [(each.id, each.name) for each in snapshots(image)] == [
        ("1", "2"),
        ("2", "1"),
        ("3", "später ;:$ %"),
    ]
    for key in ("1", "2", "3"):
        assert ours(image, key) == judged(image, key, "id")
    assert ours(image, "1") != ours(image, "2")
    assert ours(image, "später ;:$ %") == ours(image, "3")


def test_names_that_are_not_unique(tmp_path: Path) -> None:
    image = build_chain(tmp_path, ["[size=1M] 64k:A"]).active
    take(image, "same")
    put(image, "B", 0, 65536)
    take(image, "same")
    with pytest.raises(ImageError, match="2 snapshots named 'same'; name one by its id"):
        ours(image, "same")
    for key in ("1", "2"):
        assert ours(image, key) == judged(image, key, "id")


def test_a_deleted_snapshot_is_gone(tmp_path: Path) -> None:
    image = build_chain(tmp_path, ["[size=1M] 64k:A"]).active
    for letter in "BCD":
        take(image, letter)
        put(image, letter, 0, 65536)
    qemu_img("snapshot", "-d", "C", image)
    with pytest.raises(ImageError, match="no snapshot 'C'; it has: B, D"):
        ours(image, "C")
    assert_points(image, ["B", "D"])
    # The next one takes the highest id plus one.
    take(image, "E")
    assert [each.id for each in snapshots(image)] == ["1", "3", "4"]
    assert ours(image, "4") == judged(image, "4", "id")


@pytest.mark.parametrize("name", ["", "x", "0", "one\n", "ONE"])
def test_no_such_snapshot(name: str, tmp_path: Path) -> None:
    image = build_chain(tmp_path, ["64k:A"]).active
    take(image, "one")
    with pytest.raises(ImageError, match="has no snapshot") as caught:
        ours(image, name)
    assert "\n" not in str(caught.value)


def test_a_raw_image_has_none(tmp_path: Path) -> None:
    image = build_chain(tmp_path, ["[raw] 64k:A"]).active
    with pytest.raises(ImageError, match="no internal snapshots"):
        ours(image, "one")


def test_a_reverted_image(tmp_path: Path) -> None:
    """`snapshot -a` makes a point live again: both share every cluster."""
    image = build_chain(tmp_path, ["[size=1M] 64k:A 64k:B"]).active
    take(image, "one")
    put(image, "C", 0, 100 << 10)
    qemu_img("snapshot", "-a", "one", image)
    contents = assert_points(image, ["one"])
    assert ours(image) == contents[0]
    with open_chain(image) as live, open_chain(image, snapshot="one") as old:
        found = compare(live.layers, old.layers)
        assert found.identical and found.compared_bytes == 0


def test_comparing_two_points_of_one_file(tmp_path: Path) -> None:
    image = build_chain(tmp_path, ["[size=1M] 64k:A 64k:B 64k:C"]).active
    take(image, "one")
    put(image, "D", 65536 + 512, 1024)
    with open_chain(image) as live, open_chain(image, snapshot="one") as old:
        found = compare(live.layers, old.layers)
    assert (found.identical, found.first_difference) == (False, 65536 + 512)
    assert found.compared_bytes == 65536  # the rest is the same clusters


# --- the table -------------------------------------------------------------------------------


def test_facts(tmp_path: Path) -> None:
    image = build_chain(tmp_path, ["[size=1M] 64k:A"]).active
    for name in ("one", "two"):
        take(image, name)
    told = qemu_info(image)["snapshots"]
    for found, said in zip(snapshots(image), told, strict=True):
        assert found.id == said["id"] and found.name == said["name"]
        assert found.vm_state_size == said["vm-state-size"] == 0
        assert (found.date_sec, found.date_nsec) == (said["date-sec"], said["date-nsec"])
        assert found.vm_clock_nsec == said["vm-clock-sec"] * 10**9 + said["vm-clock-nsec"]
        assert found.disk_size == 1 << 20


def patch_first_entry(image: Path, offset: int, raw: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(64)
        (table,) = struct.unpack(">Q", file.read(8))
        file.seek(table + offset)
        file.write(raw)


def test_vm_state_is_noted_and_not_part_of_the_disk(tmp_path: Path) -> None:
    """qemu-img makes none: it is announced in the table, in both of the fields, by hand."""
    image = build_chain(tmp_path, ["[size=1M] 64k:A"]).active
    take(image, "one")
    patch_first_entry(image, 32, struct.pack(">I", 4096))
    patch_first_entry(image, 40, struct.pack(">Q", 5 << 32))
    (found,) = snapshots(image)
    assert found.vm_state_size == 5 << 32 == qemu_info(image)["snapshots"][0]["vm-state-size"]
    assert ours(image, "one") == judged(image, "one") == pattern("A", 0, 65536) + bytes(983040)


def test_vm_state_behind_the_end_of_the_disk(tmp_path: Path) -> None:
    """As savevm stores it: in clusters that the snapshot's L1 maps from the disk's end on."""
    image = build_chain(tmp_path, ["[cluster=512 size=1M] 64k:A 448k:- 64k:B"]).active
    take(image, "one")
    # The disk was half as long, and what follows it is the state of the machine.
    patch_first_entry(image, 40, struct.pack(">QQ", 1 << 16, 1 << 19))
    put(image, "C", 0, 1 << 20)
    (found,) = snapshots(image)
    assert (found.vm_state_size, found.disk_size) == (1 << 16, 1 << 19)
    told = qemu_info(image)["snapshots"][0]
    assert told["vm-state-size"] == 1 << 16
    expected = pattern("A", 0, 65536) + bytes((1 << 19) - 65536)
    assert ours(image, "one") == expected == reverted(image, "one")
    info = run("info", "--json", image).json["snapshots"][0]
    assert info["vm_state_size"] == 1 << 16
    assert "VM state of 64.0 KiB" in run("info", image).out
    # Its clusters are in use, not leaked.
    assert qemu_check(image) == {"corruptions": 0, "leaks": 0}
    report = run("check", "--json", image)
    assert (report.code, report.json["corruptions"], report.json["leaks"]) == (0, 0, 0)


def test_without_extra_data_the_small_field_counts(tmp_path: Path) -> None:
    """Old qemu wrote no extra data: the 32-bit VM state size, and today's disk size."""
    image = build_chain(tmp_path, ["[v2 size=1M] 64k:A"]).active
    take(image, "one")
    put(image, "B", 0, 512)
    patch_first_entry(image, 32, struct.pack(">II", 777, 0))
    # Without its extra data the id and the name follow the head at once.
    patch_first_entry(image, 40, b"1one".ljust(32, b"\0"))
    (found,) = snapshots(image)
    assert (found.id, found.name) == ("1", "one")
    assert (found.vm_state_size, found.disk_size) == (777, 1 << 20)
    assert qemu_info(image)["snapshots"][0]["vm-state-size"] == 777
    assert ours(image, "one") == judged(image, "one")


@pytest.mark.parametrize("where", ["beyond", "unaligned", "no l1", "too large", "huge"])
def test_a_broken_l1_spoils_only_its_snapshot(where: str, tmp_path: Path) -> None:
    image = build_chain(tmp_path, ["[size=1M] 64k:A"]).active
    take(image, "one")
    take(image, "two")
    offset, word = {
        "beyond": (0, struct.pack(">Q", 1 << 40)),
        "unaligned": (0, struct.pack(">Q", 512)),
        "no l1": (8, struct.pack(">I", 0)),
        "too large": (8, struct.pack(">I", (4 << 20) + 1)),
        "huge": (0, struct.pack(">Q", (1 << 64) - 65536)),
    }[where]
    patch_first_entry(image, offset, word)
    with pytest.raises(ImageError):
        ours(image, "one")
    assert ours(image, "two") == judged(image, "two")
    assert ours(image) == raw_of(image)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    options=st.sampled_from(["", "v2", "cluster=4k", "ext", "cluster=512"]),
    backed=st.booleans(),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 2000), st.integers(1, 300)),
            st.tuples(st.just("zero"), st.integers(0, 2000), st.integers(1, 300)),
            st.tuples(st.just("take"), st.just(0), st.just(0)),
            st.tuples(st.just("delete"), st.integers(0, 5), st.just(0)),
            st.tuples(st.just("apply"), st.integers(0, 5), st.just(0)),
        ),
        min_size=3,
        max_size=10,
    ),
)
def test_random(options: str, backed: bool, steps: list[tuple[str, int, int]]) -> None:
    """Written, zeroed, taken, deleted, reverted in any order."""
    with tempfile.TemporaryDirectory() as directory:
        below = ["[size=1M] 500k:Z"] if backed else []
        image = build_chain(Path(directory), [*below, f"[{options} size=1M] 64k:A"]).active
        taken: list[str] = []
        for number, (what, a, b) in enumerate(steps):
            start, length = a * 512, min(b, 2048 - a) * 512
            if what == "write":
                put(image, "BCDEFGHIJK"[number % 10], start, length)
            elif what == "zero":
                qemu_io(image, [f"write -q -z {start} {length}"], "qcow2")
            elif what == "take":
                taken.append(f"s{number}")
                take(image, taken[-1])
            elif taken and what == "delete":
                qemu_img("snapshot", "-d", taken.pop(a % len(taken)), image)
            elif taken:
                qemu_img("snapshot", "-a", taken[a % len(taken)], image)
        assert_points(image, taken)


def test_find_prefers_the_id(tmp_path: Path) -> None:
    image = build_chain(tmp_path, ["64k:A"]).active
    take(image, "2")
    take(image, "x")
    with HostFile(image) as file:
        header = read_header(file)
        assert find_snapshot(file, header, "2").name == "x"
        assert find_snapshot(file, header, "1").name == "2"
