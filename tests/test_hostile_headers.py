"""Headers that lie: every limit is named, nothing is allocated, nothing escapes as a traceback.

Where qemu-img refuses an image, so do we; `STRICTER` marks where we are stricter.
"""

from __future__ import annotations

import random
import re
import struct
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from qchain.errors import ImageError, Unsupported
from qchain.hostfile import HostFile
from qchain.qcow2.bitmaps import read_bitmaps
from qchain.qcow2.foreign import foreign_format, is_qcow2
from qchain.qcow2.header import Header, read_header
from qchain.qcow2.refcounts import read_refcount, refcount_blocks
from qchain.qcow2.snapshots import read_snapshots

CLUSTER = 65536


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def extension(kind: int, data: bytes) -> bytes:
    return u32(kind) + u32(len(data)) + data + bytes(-len(data) % 8)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    image = tmp_path_factory.mktemp("good") / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1G"], check=True)
    return image.read_bytes()


def poked(tmp_path: Path, good: bytes, pokes: dict[int, bytes]) -> Path:
    raw = bytearray(good)
    for offset, data in pokes.items():
        raw[offset : offset + len(data)] = data
    image = tmp_path / "image"
    image.write_bytes(raw)
    return image


def qemu_reads(image: Path) -> bool:
    """Whether qemu-img opens the image to read data (info alone opens less of it)."""
    done = subprocess.run(
        ["qemu-img", "map", "-f", "qcow2", "--output=json", str(image)],
        capture_output=True, timeout=60,
    )  # fmt: skip
    return done.returncode == 0


def look_at(image: Path) -> Header:
    """Read everything there is; memory must not follow what the header announces."""
    tracemalloc.start()
    try:
        with HostFile(image) as file:
            header = read_header(file)
            for read in (
                lambda: read_snapshots(file, header),
                lambda: read_bitmaps(file, header),
                lambda: read_refcount(file, header, 5),
                lambda: [None for _ in refcount_blocks(file, header, [])],
            ):
                try:
                    read()
                except ImageError as error:
                    assert "\n" not in str(error)
            # Every property answers, whatever the fields are.
            for name in dir(Header):
                if not name.startswith("_"):
                    getattr(header, name)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    return header


# pokes, what the problem must say
REFUSED = {
    "cluster_bits 8": ({20: u32(8)}, "cluster_bits is 8"),
    "cluster_bits 22": ({20: u32(22)}, "cluster_bits is 22"),
    "cluster_bits huge": ({20: u32(0xFFFFFFFF)}, "cluster_bits is 4294967295"),
    "header_length 103": ({100: u32(103)}, "header_length is 103"),
    "header longer than cluster": ({100: u32(65544)}, "header of 65544 bytes"),
    "header_length huge": ({100: u32(0xFFFFFFF8)}, "header of 4294967288 bytes"),
    "refcount_order 7": ({96: u32(7)}, "refcount_order is 7"),
    "refcount_order huge": ({96: u32(0xFFFFFFFF)}, "refcount_order is 4294967295"),
    "L1 too small": ({36: u32(1)}, "L1 table is too small: 1 entries, 2 are needed"),
    "L1 empty": ({36: u32(0)}, "L1 table is too small"),
    "L1 too large": ({36: u32((32 << 20) // 8 + 1)}, "larger than 33554432"),
    "L1 unaligned": ({40: u64(3 * CLUSTER + 512)}, "L1 table offset 197120 is not cluster-aligned"),
    "L1 offset impossible": ({40: u64((1 << 64) - CLUSTER)}, "L1 table offset"),
    "size beyond L1": ({24: u64((1 << 30) + 1)}, "2 are needed|3 are needed"),
    "size huge": ({24: u64((1 << 64) - 1)}, "is too large"),
    "refcount table unaligned": ({48: u64(CLUSTER + 512)}, "refcount table offset 66048"),
    "no refcount table": ({56: u32(0)}, "no refcount table"),
    "refcount table too large": ({56: u32(129)}, "refcount table of 129 clusters"),
    "refcount table huge": ({56: u32(0xFFFFFFFF)}, "refcount table of 4294967295 clusters"),
    "too many snapshots": ({60: u32(65537)}, "65537 internal snapshots"),
    "snapshot table unaligned": ({60: u32(1), 64: u64(512)}, "snapshot table offset 512"),
    "crypt_method 3": ({32: u32(3)}, "unknown encryption method 3"),
    "LUKS without header": ({32: u32(2)}, "without a pointer to the LUKS header"),
    "unknown feature": ({72: u64(1 << 40)}, "unknown incompatible feature: bit 40"),
    "compression type 2": ({72: u64(8), 104: b"\2"}, "unknown compression type 2"),
    "compression bit alone": ({72: u64(8)}, "contradicts the feature bit"),
    "compression type alone": ({104: b"\1"}, "contradicts the feature bit"),
    "data file without name": ({72: u64(4)}, "external data file without a name"),
    "extended L2, small clusters": (
        {20: u32(13), 72: u64(16), 24: u64(1 << 20)},
        "extended L2 entries with clusters of 8192",
    ),
    "backing name too long": ({8: u64(1024), 16: u32(1024)}, "name of 1024 bytes is too long"),
    "backing name huge": ({8: u64(1024), 16: u32(0xFFFFFFFF)}, "name of 4294967295 bytes"),
    "backing name leaves cluster": ({8: u64(65530), 16: u32(7)}, "name of 7 bytes is too long"),
    "backing name outside": ({8: u64(CLUSTER + 1), 16: u32(7)}, "outside the first cluster"),
    "extension too long": ({112: u32(0x11111111) + u32(CLUSTER)}, "0x11111111 .*runs out"),
    "extension over the name": (
        {8: u64(200), 16: u32(4), 112: u32(0x11111111) + u32(100)},
        "0x11111111 .*runs out",
    ),
    "backing format too long": ({112: extension(0xE2792ACA, b"q" * 16)}, "name of 16 bytes"),
    "LUKS pointer, no LUKS": ({112: extension(0x0537BE77, bytes(16))}, "encryption is not LUKS"),
    "LUKS pointer short": (
        {32: u32(2), 112: extension(0x0537BE77, bytes(8))},
        "extension of 8 bytes|without a pointer",
    ),
    "LUKS header unaligned": (
        {32: u32(2), 112: extension(0x0537BE77, u64(512) + u64(512))},
        "LUKS header offset 512",
    ),
    "no bitmaps": ({88: u64(1), 112: extension(0x23852875, bytes(24))}, "0 bitmaps, not 1"),
    "too many bitmaps": (
        {88: u64(1), 112: extension(0x23852875, u32(65536) + u32(0) + u64(64) + u64(CLUSTER))},
        "65536 bitmaps",
    ),
    "bitmap reserved": (
        {88: u64(1), 112: extension(0x23852875, u32(1) + u32(9) + u64(64) + u64(CLUSTER))},
        "reserved field",
    ),
    "bitmap directory unaligned": (
        {88: u64(1), 112: extension(0x23852875, u32(1) + u32(0) + u64(64) + u64(8))},
        "bitmap directory offset 8",
    ),
    "bitmap directory huge": (
        {88: u64(1), 112: extension(0x23852875, u32(1) + u32(0) + u64(1 << 63) + u64(CLUSTER))},
        "directory of 9223372036854775808 bytes",
    ),
    "bitmaps extension short": (
        {88: u64(1), 112: extension(0x23852875, bytes(16))},
        "bitmaps extension of 16 bytes",
    ),
}  # fmt: skip

# qemu reads zeroes where the file has ended.
STRICTER = {
    "L1 outside": ({40: u64(1 << 40)}, "L1 table ends at 1099511627792, beyond the file"),
    "L1 large, not there": ({36: u32((32 << 20) // 8)}, "L1 table ends at 33751040"),
}


@pytest.mark.parametrize("case", [*REFUSED, *STRICTER])
def test_refused(tmp_path: Path, good: bytes, case: str) -> None:
    pokes, expected = (REFUSED | STRICTER)[case]
    image = poked(tmp_path, good, pokes)
    header = look_at(image)
    assert any(re.search(expected, problem) for problem in header.problems), header.problems
    assert all(p.isprintable() for p in header.problems)
    assert not header.readable
    with pytest.raises(ImageError) as error:
        header.require_readable(image)
    assert error.value.exit_code == 4
    assert re.search(expected, error.value.why) or len(header.problems) > 1
    assert qemu_reads(image) == (case in STRICTER)


def test_unsupported_is_not_invalid(tmp_path: Path, good: bytes) -> None:
    for pokes in ({72: u64(1 << 40)}, {32: u32(3)}, {72: u64(8), 104: b"\2"}):
        image = poked(tmp_path, good, pokes)
        with pytest.raises(Unsupported):
            look_at(image).require_readable(image)


def test_unknown_feature_is_named_by_the_image(tmp_path: Path, good: bytes) -> None:
    table = b"\0\x2a" + b"teleportation".ljust(46, b"\0") + b"\0\x2b" + b"\x1b[31m".ljust(46, b"\0")
    pokes = {72: u64(3 << 42), 112: extension(0x6803F857, table) + bytes(8)}
    image = poked(tmp_path, good, pokes)
    header = look_at(image)
    assert "teleportation" in header.incompatible_names
    with pytest.raises(Unsupported, match="teleportation") as error:
        header.require_readable(image)
    assert "\x1b" not in str(error.value)


# Read by qemu and by us, with a word about it.
READ = {
    "dirty": ({72: u64(1)}, "marked dirty", False),
    "corrupt": ({72: u64(2)}, "marked corrupt", True),
    "refcount table outside": ({48: u64(1 << 40)}, "refcount table ends at", True),
    "snapshot table outside": ({60: u32(1), 64: u64(1 << 40)}, "snapshot table lies", True),
    "header_length odd": ({100: u32(105), 104: bytes(16)}, "not a multiple of 8", False),
    "size odd": ({24: u64((1 << 29) + 5)}, "not a multiple of 512", False),
}


@pytest.mark.parametrize("case", READ)
def test_read_with_a_word(tmp_path: Path, good: bytes, case: str) -> None:
    pokes, expected, is_problem = READ[case]
    image = poked(tmp_path, good, pokes)
    header = look_at(image)
    assert header.readable
    header.require_readable(image)
    assert any(expected in text for text in (header.problems if is_problem else header.warnings))
    assert bool(header.problems) == is_problem
    assert header.size % 512 == 0
    if case != "snapshot table outside":
        assert qemu_reads(image)


def test_not_even_described(tmp_path: Path, good: bytes) -> None:
    image = tmp_path / "image"
    for raw, expected in (
        (b"", "not qcow2"),
        (b"QF", "not qcow2"),
        (b"\0" * 1024, "not qcow2"),
        (b"KDMV" + bytes(600), "not qcow2 but vmdk"),
        (b"QFI\xfb", "ends within the header|version"),
        (good[:71], "ends within the header"),
        (good[:103], "ends within the header"),
        (good[:4] + u32(1) + good[8:], "qcow"),
        (good[:4] + u32(4) + good[8:], "version 4"),
        (good[:4] + u32(0xFFFFFFFF) + good[8:], "version 4294967295"),
    ):
        image.write_bytes(raw)
        with HostFile(image) as file, pytest.raises(ImageError, match=expected):
            read_header(file)


def test_cut_short(tmp_path: Path, good: bytes) -> None:
    """Every length of the first bytes: described, or refused as an `ImageError`."""
    image = tmp_path / "image"
    for length in [
        *range(0, 700, 7),
        CLUSTER - 1,
        CLUSTER,
        2 * CLUSTER,
        3 * CLUSTER,
        len(good) - 1,
    ]:
        image.write_bytes(good[:length])
        try:
            header = look_at(image)
        except ImageError:
            assert length < 104
        else:
            assert not header.readable


def test_many_extensions_are_bounded(tmp_path: Path, good: bytes) -> None:
    image = poked(tmp_path, good, {112: extension(0x55555555, b"") * 8000})
    header = look_at(image)
    assert len(header.extensions) <= 1024
    assert any("more than 1024" in problem for problem in header.problems)


def test_noise(tmp_path: Path, good: bytes) -> None:
    """Random bytes in the header: no exception but `ImageError`, and no great memory."""
    rng = random.Random(20)
    for _ in range(300):
        pokes = {
            rng.randrange(4, 240): bytes(rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
                                         for _ in range(rng.randrange(1, 9)))
            for _ in range(rng.randrange(1, 5))
        }  # fmt: skip
        try:
            look_at(poked(tmp_path, good, pokes))
        except ImageError as error:
            assert "\n" not in str(error)


def snapshot_image(tmp_path: Path, good: bytes, entry: bytes, count: int = 1) -> Path:
    image = poked(tmp_path, good, {60: u32(count), 64: u64(4 * CLUSTER)})
    with image.open("r+b") as out:
        out.seek(4 * CLUSTER)
        out.write(entry)
    return image


@pytest.mark.parametrize(
    "entry, count, expected",
    [
        (bytes(39), 1, "entry 0 lies beyond the file"),
        (bytes(36) + u32(1025) + bytes(2000), 1, "1025 bytes of extra data"),
        (bytes(36) + u32(0xFFFFFFFF), 1, "4294967295 bytes of extra data"),
        (bytes(12) + b"\xff\xff\xff\xff" + bytes(24), 1, "entry 0 ends beyond the file"),
        (bytes(40) * 3, 65536, "entry 3 lies beyond the file"),
    ],
)
def test_hostile_snapshots(
    tmp_path: Path, good: bytes, entry: bytes, count: int, expected: str
) -> None:
    image = snapshot_image(tmp_path, good, entry, count)
    with HostFile(image) as file, pytest.raises(ImageError, match=expected):
        read_snapshots(file, read_header(file))


@pytest.fixture(scope="module")
def with_bitmap(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    image = tmp_path_factory.mktemp("bitmap") / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1G"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", str(image), "name"], check=True)
    return image.read_bytes()


@pytest.mark.parametrize(
    "at, data, expected",
    [
        (0, u64(0), "a table at offset 0"),
        (0, u64(CLUSTER + 8), "a table at offset 65544"),
        (8, u32(0), "a table of 0 entries"),
        (8, u32(0x8000001), "a table of 134217729 entries"),
        (8, u32(8193), "536936448 bytes"),
        (12, u32(0x80000000), "reserved flags 0x80000000"),
        (16, b"\2", "unknown type 2"),
        (17, b"\x08", "granularity_bits 8"),
        (17, b"\x20", "granularity_bits 32"),
        (17, b"\x09", "bits for 268435456 bytes only"),
        (18, b"\0\0", "a name of 0 bytes"),
        (18, b"\xff\xff", "ends beyond the bitmap directory"),
        (20, u32(0xFFFFFFFF), "ends beyond the bitmap directory"),
    ],
)
def test_hostile_bitmaps(
    tmp_path: Path, with_bitmap: bytes, at: int, data: bytes, expected: str
) -> None:
    image = poked(tmp_path, with_bitmap, {})
    with HostFile(image) as file:
        where = read_header(file).bitmaps_extension
        assert len(read_bitmaps(file, read_header(file))) == 1
    assert where is not None
    image = poked(tmp_path, with_bitmap, {where.directory_offset + at: data})
    with HostFile(image) as file, pytest.raises(ImageError, match=expected):
        read_bitmaps(file, read_header(file))
    assert not qemu_reads(image)


@pytest.mark.parametrize(
    "fmt, name",
    [("vmdk", "vmdk"), ("vdi", "vdi"), ("vhdx", "vhdx"), ("vpc", "vpc"), ("qed", "qed"),
     ("qcow", "qcow"), ("parallels", "parallels"), ("raw", None), ("qcow2", None)],
)  # fmt: skip
def test_foreign_formats(tmp_path: Path, fmt: str, name: str | None) -> None:
    """Images that qemu-img itself made."""
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", fmt, str(image), "10M"], check=True)
    first, size = image.read_bytes()[:512], image.stat().st_size
    assert foreign_format(first, size) == name
    assert is_qcow2(first) == (fmt == "qcow2")
