"""Dirty ranges of persistent bitmaps: what qemu exports of them, and what was written.

Two judges: qemu-nbd, whose export of a bitmap `qemu-img map` reads, and the list of
writes made while the bitmap recorded.
"""

from __future__ import annotations

import json
import struct
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.oracle import qemu_img, qemu_io
from qchain.errors import ImageError
from qchain.hostfile import HostFile
from qchain.qcow2.bitmaps import Bitmap, dirty_ranges, find_bitmap, read_bitmaps
from qchain.qcow2.header import read_header

Ranges = list[tuple[int, int]]


def ours(image: Path, name: str) -> Ranges:
    with HostFile(image) as file:
        header = read_header(file)
        return list(dirty_ranges(file, header, find_bitmap(file, header, name)))


def exported(image: Path, name: str) -> Ranges:
    """The dirty ranges as qemu-nbd gives them to a client. It shows them as 'no data'."""
    with tempfile.TemporaryDirectory() as scratch:
        socket = Path(scratch) / "socket"
        argv = ["qemu-nbd", "-r", "-f", "qcow2", "-B", name, "-k", str(socket), str(image)]
        with subprocess.Popen(argv, stderr=subprocess.PIPE) as server:
            try:
                deadline = time.monotonic() + 30
                while not socket.exists():
                    assert server.poll() is None, server.stderr and server.stderr.read()
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                client = f"driver=nbd,server.type=unix,server.path={socket}"
                told = qemu_img(
                    "map", "--output=json", "--image-opts",
                    f"{client},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
                )  # fmt: skip
            finally:
                server.kill()
    return joined((e["start"], e["length"]) for e in json.loads(told.stdout) if not e["data"])


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    out: Ranges = []
    for start, length in sorted(ranges):
        if out and out[-1][0] + out[-1][1] >= start:
            end = max(out[-1][0] + out[-1][1], start + length)
            out[-1] = (out[-1][0], end - out[-1][0])
        else:
            out.append((start, length))
    return out


def expected(writes: Iterable[tuple[int, int]], granularity: int, size: int) -> Ranges:
    """Every unit that a write touches, cut at the end of the disk."""
    rounded = []
    for start, length in writes:
        low = start // granularity * granularity
        high = min(-(-(start + length) // granularity) * granularity, size)
        rounded.append((low, high - low))
    return joined(rounded)


def make(
    image: Path, size: int, granularity: int, writes: Iterable[tuple[int, int]], options: str = ""
) -> Path:
    """An image, written before and after it got the bitmap 'b'."""
    words = ["-o", options] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *words, image, str(size))
    qemu_io(image, ["write -q -P 1 0 512"], "qcow2")
    qemu_img("bitmap", "--add", "--enable", "-g", str(granularity), image, "b")
    commands = [f"write -q -P 2 {start} {length}" for start, length in writes]
    if commands:
        qemu_io(image, commands, "qcow2")
    return image


M = 1 << 20
CASES: dict[str, tuple[int, int, str, Ranges]] = {
    "nothing": (10 * M, 65536, "", []),
    "first and last": (10 * M, 65536, "", [(0, 512), (10 * M - 512, 512)]),
    "adjacent": (10 * M, 65536, "", [(65536, 65536), (131072, 1), (196607, 2)]),
    "everything": (4 * M, 65536, "", [(0, 4 * M)]),
    "odd end": (4 * M + 512, 65536, "", [(4 * M, 512), (M, 512)]),
    "odd end, far unit": (4 * M + 512, 2 * M, "", [(4 * M, 512), (M, 512)]),
    # The finest bits in the smallest clusters: several table entries, many bits.
    "fine": (9 * M, 512, "cluster_size=512", [(0, 512), (M, 3 * M), (5 * M, 1), (8 * M + 512, 9)]),
    "all ones": (16 * M, 512, "cluster_size=512", [(0, 16 * M)]),
    "across entries": (16 * M, 512, "cluster_size=512", [(2 * M - 1024, 2048), (6 * M, 4 * M)]),
    "ends at an entry": (16 * M, 512, "cluster_size=512", [(4 * M, 2 * M), (8 * M, 512)]),
    "large clusters": (64 * M, 512, "cluster_size=2M", [(M, 512), (63 * M, 5000)]),
    "coarse": (1 << 42, 1 << 31, "", [(1 << 41, 512), (5 << 31, 1), ((1 << 42) - 512, 512)]),
    "several windows": (24 << 30, 4096, "cluster_size=2M", [(4 << 30, 8192), (20 << 30, 4096)]),
    "subclusters": (10 * M, 4096, "extended_l2=on", [(3 * M, 2048), (M, 100000)]),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, tmp_path: Path) -> None:
    size, granularity, options, writes = CASES[name]
    image = make(tmp_path / "a.qcow2", size, granularity, writes, options)
    found = ours(image, "b")
    assert found == expected(writes, granularity, size)
    assert found == exported(image, "b")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sectors=st.integers(1, 40000),
    granularity=st.integers(9, 20),
    cluster=st.integers(9, 17),
    writes=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 300000)), max_size=12),
)
def test_random(
    sectors: int, granularity: int, cluster: int, writes: list[tuple[float, int]]
) -> None:
    size = sectors * 512
    spans = [(int(at * (size - 1)), length) for at, length in writes]
    spans = [(start, min(length, size - start)) for start, length in spans]
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "a.qcow2"
        make(image, size, 1 << granularity, spans, f"cluster_size={1 << cluster}")
        found = ours(image, "b")
        assert found == expected(spans, 1 << granularity, size)
        assert found == exported(image, "b")


def test_several_bitmaps_are_told_apart(tmp_path: Path) -> None:
    image = make(tmp_path / "a.qcow2", 10 * M, 65536, [(M, 512)])
    qemu_img("bitmap", "--disable", image, "b")
    qemu_img("bitmap", "--add", "--enable", "-g", "4k", image, "später")
    qemu_io(image, ["write -q -P 3 5M 512"], "qcow2")
    assert ours(image, "b") == [(M, 65536)]
    assert ours(image, "später") == [(5 * M, 4096)]
    qemu_img("bitmap", "--clear", image, "b")
    assert ours(image, "b") == []
    qemu_img("bitmap", "--merge", "später", image, "b")
    assert ours(image, "b") == [(5 * M, 65536)]
    with pytest.raises(ImageError, match="no bitmap 'c'; it has: b, später"):
        ours(image, "c")


def test_a_bitmap_that_grew_with_its_disk(tmp_path: Path) -> None:
    image = make(tmp_path / "a.qcow2", 4 * M, 65536, [(4 * M - 512, 512)])
    qemu_img("resize", "-q", image, "100M")
    qemu_io(image, ["write -q -P 3 99M 512"], "qcow2")
    assert ours(image, "b") == exported(image, "b")
    assert (99 * M, 65536) in ours(image, "b")


def test_memory_does_not_grow_with_the_disk(tmp_path: Path) -> None:
    """256 GiB in units of 4 KiB are 8 MiB of bits, 64 M cells when unpacked."""
    size = 256 << 30
    image = make(
        tmp_path / "a.qcow2", size, 4096, [(i << 30, 4096) for i in range(256)], "cluster_size=2M"
    )
    tracemalloc.start()
    try:
        count = len(ours(image, "b"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 256
    assert peak < 12 << 20


# --- damage --------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, Bitmap]:
    image = make(tmp_path / "a.qcow2", 10 * M, 65536, [(M, 512)])
    with HostFile(image) as file:
        return image, read_bitmaps(file, read_header(file))[0]


@pytest.mark.parametrize(
    ("word", "why"),
    [
        (2, "breaks the format"),
        (0x100, "breaks the format"),
        (1 << 63, "breaks the format"),
        (1 << 56, "breaks the format"),
        (0x50001, "breaks the format"),
        (0x50200, "breaks the format"),
        (0x7FFFFFFF0000, "beyond the file"),
    ],
)
def test_damaged_table(word: int, why: str, damaged: tuple[Path, Bitmap]) -> None:
    image, bitmap = damaged
    with image.open("r+b") as file:
        file.seek(bitmap.table_offset)
        file.write(struct.pack(">Q", word))
    with pytest.raises(ImageError, match=why) as caught:
        ours(image, "b")
    assert str(image) in str(caught.value)


def test_all_ones_by_hand(damaged: tuple[Path, Bitmap]) -> None:
    """An entry of 1 has no cluster; all its part of the disk is dirty, up to the disk's end."""
    image, bitmap = damaged
    with image.open("r+b") as file:
        file.seek(bitmap.table_offset)
        file.write(struct.pack(">Q", 1))
    assert ours(image, "b") == [(0, 10 * M)] == exported(image, "b")


def test_the_file_ends_before_the_table(damaged: tuple[Path, Bitmap]) -> None:
    image, bitmap = damaged
    with HostFile(image) as file:
        header = read_header(file)
        file.size = bitmap.table_offset + 4
        with pytest.raises(ImageError, match="ends beyond the file"):
            list(dirty_ranges(file, header, bitmap))


def test_bits_behind_the_end_of_the_disk_are_ignored(damaged: tuple[Path, Bitmap]) -> None:
    image, bitmap = damaged
    with image.open("r+b") as file:
        file.seek(bitmap.table_offset)
        (where,) = struct.unpack(">Q", file.read(8))
        file.seek(where + 19)  # 10 MiB are 160 bits, the last byte of which is number 19
        file.write(b"\x80\xff\xff")
    assert ours(image, "b") == [(M, 65536), (10 * M - 65536, 65536)]


def test_a_stale_bitmap_is_read_as_it_was_stored(damaged: tuple[Path, Bitmap]) -> None:
    image, _ = damaged
    with HostFile(image) as file:
        extension = read_header(file).bitmaps_extension
    assert extension is not None
    with image.open("r+b") as file:
        file.seek(extension.directory_offset + 12)
        file.write(struct.pack(">I", 3))
    with HostFile(image) as file:
        header = read_header(file)
        bitmap = find_bitmap(file, header, "b")
        assert bitmap.in_use
        assert list(dirty_ranges(file, header, bitmap)) == [(M, 65536)]
