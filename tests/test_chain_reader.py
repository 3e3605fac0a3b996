"""The content of every point of a chain is what the shadow model and qemu read."""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.build import Chain, build_chain
from fixtures.generate import chains
from fixtures.language import LayerLike, LayerSpec
from fixtures.oracle import QemuError, qemu_img, raw_of, run_tool
from fixtures.shadow import pattern, shadow_points
from qchain.chain.chain import open_chain
from qchain.chain.digest import digest
from qchain.chain.layer import Layer
from qchain.chain.reader import PIECE, pieces, read
from qchain.errors import DataError, ImageError, Unsupported, UsageError

SLOW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))

EXAMPLES: dict[str, list[LayerLike]] = {
    "all kinds": ["64k:A 64k:b 64k:0 64k:+ 64k:. 64k:~ 64k:-", "[cluster=4k] 4k:0 4k:+ 4k:. 4k:~"],
    "raw base": ["[raw] 64k:A 1k:0 1k:~ 512:+ 512:. 64k:-", "2k:- 512:B"],
    "raw base, longer above": ["[raw] 9k:A", "[size=300k] 200k:- 512:B"],
    "short between": ["256k:A", "[size=64k] 16k:B", "[size=256k] 32k:- 1k:C"],
    "two short between": ["1M:A", "[size=512k]", "[size=99k] 1k:B", "[size=700k]", "[size=2M]"],
    "unaligned sizes": ["[cluster=4k] 5k:A", "[cluster=512] 4k:- 1k:B", "[cluster=64k size=9k]"],
    "extended": ["256k:A", "[ext zstd] 64k:a 2k:B 2k:0 2k:~ 58k:- | 128k:- 64k:~"],
    "compressed": ["[zstd cluster=4k] 64k:a 1k:b", "[cluster=512] 5k:c 512:0"],
    "compressed, half covered": ["[zstd] 256k:a", "[cluster=4k] 4k:- 4k:B 61k:- 512:C"],
    "compressed, large clusters": ["[zstd cluster=2M] 3M:a", "[cluster=512] 1M:- 512:b 512:C"],
    "v2 discard does nothing": ["256k:A", "[v2] 128k:B | 192k:~"],
    "preallocated": ["[prealloc=metadata] 64k:A 64k:-", "[ext prealloc=metadata] 64k:-"],
    "data file": ["[datafile] 64k:A 64k:0 64k:B | 64k:~", "[size=256k] 1k:B"],
    "several pieces": [
        "[cluster=4k] 3M:A 6M:- 9M:B 512:C",
        "[cluster=512] 4M:- 1M:0 512:D 1k:- 6M:E",
    ],
    "empty disk": ["[size=0]", "[size=64k] 512:A"],
}  # fmt: skip


def content(layers: Sequence[Layer], start: int = 0, end: int | None = None) -> bytes:
    """What `pieces` hands over, checked to be in order, without gaps, within bounds."""
    out = bytearray()
    for piece in pieces(layers, start, end):
        assert piece.start == start + len(out)
        assert piece.length > 0
        if piece.data is None:
            out += bytes(piece.length)
        else:
            assert len(piece.data) == piece.length <= PIECE
            out += piece.data.tobytes()
    return bytes(out)


def assert_reads_as(
    layers: Sequence[Layer], point: bytes, spans: Sequence[tuple[int, int]]
) -> None:
    size = len(point)
    assert layers[0].size == size
    assert read(layers, 0, size) == point
    assert content(layers) == point
    for start, length in spans:
        expected = point[start : start + length]
        assert read(layers, start, length) == expected, (start, length)
        assert content(layers, start, start + length) == expected, (start, length)
    assert digest(layers) == hashlib.sha256(point).hexdigest()


def assert_all_points(built: Chain, fractions: Sequence[tuple[float, int]]) -> None:
    points = shadow_points(built.specs)
    with open_chain(built.active, fmt=built.formats[-1]) as chain:
        for depth in range(len(chain.layers)):
            point = points[-1 - depth]
            spans = [(int(at * len(point)), length) for at, length in fractions]
            assert_reads_as(chain.layers[depth:], point, spans)


SPANS = [(0.0, 1), (0.0, 512), (0.3, 70000), (0.5, 1), (0.7, 1 << 30), (0.99, 513), (1.0, 1)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    assert_all_points(build_chain(tmp_path, EXAMPLES[name]), SPANS)


@SLOW
@given(
    specs=chains(),
    spans=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1 << 20)), min_size=2, max_size=5),
)
def test_random_chain(specs: list[LayerSpec], spans: list[tuple[float, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        assert_all_points(build_chain(Path(directory), specs), spans)


@pytest.mark.parametrize("algorithm", ["sha256", "md5", "sha1", "blake2b", "sha3_512"])
def test_digest_is_that_of_the_raw_file(algorithm: str, tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["[raw] 1M:A 3M:-", "[ext] 100k:- 70k:B 3M:0", "[size=5M] 64k:c"])
    expected = hashlib.new(algorithm, raw_of(built.active)).hexdigest()
    with open_chain(built.active) as chain:
        assert digest(chain.layers, algorithm) == expected


@pytest.mark.parametrize("algorithm", ["shake_128", "sha257", "", "../md5"])
def test_unusable_digest(algorithm: str, tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["64k:A"])
    with open_chain(built.active) as chain, pytest.raises(UsageError):
        digest(chain.layers, algorithm)


def test_holes_are_skipped_at_once(tmp_path: Path) -> None:
    """A terabyte of nothing: pieces without data, as many as there are windows, not clusters."""
    built = build_chain(tmp_path, ["[cluster=2M size=1024G] 64k:A", "[cluster=2M size=1024G] 4M:-"])
    with open_chain(built.active) as chain:
        found = list(pieces(chain.layers))
    assert found[0].data is not None
    assert all(piece.data is None for piece in found[1:])
    assert sum(piece.length for piece in found) == 1 << 40
    assert len(found) < 100


def test_progress(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["[cluster=4k size=100M] 3M:A 20M:- 5M:B"])
    seen: list[tuple[int, int]] = []
    with open_chain(built.active) as chain:
        digest(chain.layers, progress=lambda *at: seen.append(at))
    assert seen == sorted(seen)
    assert seen[-1] == (100 << 20, 100 << 20)


def test_closing_a_reader_early_leaves_no_threads(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["[cluster=4k size=100M] 60M:A"])
    with open_chain(built.active) as chain:
        reader = pieces(chain.layers)
        assert next(reader).start == 0
        reader.close()


# --- damage -------------------------------------------------------------------------------


def l2_entry(path: Path, cluster: int) -> int:
    """Where in the file the L2 entry of a guest cluster is (read from the header by hand)."""
    with path.open("rb") as file:
        head = file.read(104)
        bits = struct.unpack_from(">I", head, 20)[0]
        words = 2 if head[7] == 3 and struct.unpack_from(">Q", head, 72)[0] & 16 else 1
        per_table = (1 << bits) // (8 * words)
        file.seek(struct.unpack_from(">Q", head, 40)[0] + cluster // per_table * 8)
        table = struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00
    assert table, "no L2 table there"
    return int(table + cluster % per_table * 8 * words)


def peek(path: Path, cluster: int) -> tuple[int, int]:
    with path.open("rb") as file:
        file.seek(l2_entry(path, cluster))
        first, second = struct.unpack(">QQ", file.read(16))
    return first, second


def poke(path: Path, cluster: int, *words: int) -> None:
    with path.open("r+b") as file:
        file.seek(l2_entry(path, cluster))
        file.write(struct.pack(f">{len(words)}Q", *words))


def qemu_reads(path: Path, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
    """What qemu reads in each (start, length), multiples of 512; None where it fails."""
    out: list[bytes | None] = []
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        for start, length in spans:
            view = f"driver=raw,offset={start},size={length},file.driver=qcow2"
            try:
                options = ["--image-opts", f"{view},file.file.filename={path}"]
                qemu_img("convert", "-O", "raw", *options, raw)
                out.append(raw.read_bytes())
            except QemuError as error:
                assert "error while reading" in str(error), error
                out.append(None)
    return out


def assert_as_qemu(path: Path, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
    """We and qemu read the same bytes, or both fail; returns what qemu read."""
    expected = qemu_reads(path, spans)
    with open_chain(path) as chain:
        for (start, length), wanted in zip(spans, expected, strict=True):
            try:
                found: bytes | None = read(chain.layers, start, length)
            except DataError:
                found = None
            assert (found is None) == (wanted is None), (start, length, found and found[:32])
            assert found == wanted, (start, length)
    return expected


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("damage", ["ones", "zeroes", "cut"])
def test_damaged_compressed_cluster(compression: str, damage: str, tmp_path: Path) -> None:
    built = build_chain(
        tmp_path, [f"[{compression}] 64k:a 64k:b 64k:C", "[cluster=512] 64k:- 512:D"]
    )
    entry, _ = peek(built.base, 1)
    offset = entry & (1 << 54) - 1
    with built.base.open("r+b") as file:
        if damage == "cut":
            file.truncate(offset + 40)
        else:
            file.seek(offset)
            file.write((b"\xff" if damage == "ones" else b"\0") * 64)
    spans = [(0, 65536), (65536, 65536), (66048, 512)]
    if damage != "cut":
        assert assert_as_qemu(built.active, spans)[1:] == [None, None]
    # qemu takes zeroes for what was cut off and decodes them to whatever they mean: never we.
    with open_chain(built.active) as chain:
        assert read(chain.layers, *spans[0]) == qemu_reads(built.active, spans[:1])[0]
        for span in spans[1:]:
            with pytest.raises(DataError):
                read(chain.layers, *span)
        with pytest.raises(DataError, match="compressed cluster") as caught:
            list(pieces(chain.layers))
        assert str(built.base) in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(DataError):
            digest(chain.layers)


def test_stream_that_is_too_short(tmp_path: Path) -> None:
    """A stream of fewer bytes than a cluster, and one of more: qemu takes a cluster of it."""
    built = build_chain(tmp_path, ["128k:a 64k:-"])
    for cluster, size in enumerate((1000, 65536 + 4096)):
        entry, _ = peek(built.base, cluster)
        packer = zlib.compressobj(9, wbits=-12)
        data = packer.compress(b"x" * size) + packer.flush()
        assert len(data) <= 512
        with built.base.open("r+b") as file:
            file.seek(entry & (1 << 54) - 1)
            file.write(data)
    found = assert_as_qemu(built.base, [(0, 65536), (65536, 65536)])
    assert found == [None, b"x" * 65536]


def test_data_beyond_the_file_is_zero(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["192k:A 64k:-"])
    entry, _ = peek(built.base, 1)
    poke(built.base, 1, (entry & 1 << 63) | 0x7FFF0000)
    with built.base.open("r+b") as file:  # and the file ends within cluster 2
        file.truncate((peek(built.base, 2)[0] & (1 << 56) - 512) + 700)
    found = assert_as_qemu(built.base, [(0, 65536), (65536, 65536), (131072, 65536)])
    assert found[1] == bytes(65536)
    assert found[2] is not None and found[2][700:] == bytes(65536 - 700)


HOSTILE = [
    0, 1, 1 << 63, (1 << 63) | 1, 512, 513, (1 << 63) | 0x50200, 0x50000, 0x50001, 0x50201, 2, 254,
    (1 << 62), (1 << 62) | 0x50000, (3 << 62) | 0x50001, (1 << 62) | (1 << 62) - 1, (1 << 64) - 1,
    0x00FFFFFFFFFF0000, 0x0100000000000000 | 0x50000, 0x7F << 56,
]  # fmt: skip


@pytest.mark.parametrize("options", ["", "v2", "cluster=4k", "zstd", "datafile"])
def test_hostile_entries(options: str, tmp_path: Path) -> None:
    """Every odd entry reads as in qemu, or fails as there; the others are not harmed."""
    size = 4096 if "4k" in options else 65536
    count = len(HOSTILE) + 2
    built = build_chain(
        tmp_path, [f"{count * size}:Z", f"[{options} size={count * size}] {size}:A {size}:B"]
    )
    for cluster, word in enumerate(HOSTILE, 1):
        poke(built.active, cluster, word)
    spans = [(cluster * size, size) for cluster in range(count)]
    found = assert_as_qemu(built.active, spans)
    assert found[0] and found[-1]
    assert None in found
    # A finer layer above hides what is broken.
    above = tmp_path / "above.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", built.active.name, "-F", "qcow2", above)
    run_tool(["qemu-io", "-f", "qcow2", "-c", f"write -q -z 0 {count * size}", above])
    with open_chain(above) as chain:
        assert read(chain.layers, 0, count * size) == bytes(count * size)


def l1_word(path: Path, index: int, word: int | None = None) -> int:
    """The L1 entry of an image, set first if a word is given."""
    with path.open("r+b") as file:
        file.seek(40)
        at = struct.unpack(">Q", file.read(8))[0] + index * 8
        if word is not None:
            file.seek(at)
            file.write(struct.pack(">Q", word))
        file.seek(at)
        found: int = struct.unpack(">Q", file.read(8))[0]
    return found


@pytest.mark.parametrize("options", ["", "v2", "ext"])
def test_hostile_l1_entries(options: str, tmp_path: Path) -> None:
    """As L2 entries: read as in qemu, or not at all as there; other tables are not harmed."""
    cluster = 16384 if options == "ext" else 4096
    table = cluster // (16 if options == "ext" else 8) * cluster
    head = f"[{options or 'v3'} cluster={cluster} size={3 * table}]"
    runs = f"8k:A {table - 8192}:- 8k:B {table - 8192}:- 8k:C"
    built = build_chain(tmp_path, [f"[cluster=2M] {3 * table}:Z", f"{head} {runs}"])
    good = [l1_word(built.active, index) for index in range(3)]
    # The middle table is spoilt. Where no table can be the image is refused as a whole; qemu
    # fails there, or reads zeroes if it is beyond the end of the file.
    beyond = [1 << 63 | 0x7FFF0000, 1 << 63 | 0x00FFFFFFFFFF0000]
    refused = [good[1] + 512, (1 << 64) - 1, *beyond]
    spans = [(index * table, 8192) for index in range(3)]
    for word in refused:
        l1_word(built.active, 1, word)
        assert (qemu_reads(built.active, spans)[1] is None) == (word not in beyond)
        with pytest.raises(ImageError, match="L1 entry 1 points to"):
            open_chain(built.active)
    contents = set()
    for word in (
        0, 1 << 63, 1, 511, good[1] | 1, good[1] | 1 << 56, good[1] | 0x7F << 56,
        good[1] & ~(1 << 63), good[0],
    ):  # fmt: skip
        l1_word(built.active, 1, word)
        found = assert_as_qemu(built.active, spans)
        assert found[0] and found[2]
        contents.add(found[1])
    # The base, its own table, and that of the first entry, which is found[0] again.
    assert contents == {pattern("Z", table, 8192), pattern("B", table, 8192), found[0]}


def test_the_last_sector_of_compressed_data_may_lie_beyond_the_file(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["[size=128k] 64k:a"])
    word, _ = peek(built.base, 0)
    offset = word & (1 << 54) - 1
    raw = built.base.read_bytes()
    stream = zlib.decompressobj(-12)
    stream.decompress(raw[offset:])
    end = len(raw) - len(stream.unused_data)
    assert end % 512, "the stream fills its sectors by chance"
    os.truncate(built.base, end)
    assert assert_as_qemu(built.base, [(0, 65536)]) == [pattern("A", 0, 65536)]


WORDS = st.one_of(st.sampled_from(HOSTILE), st.integers(0, (1 << 64) - 1))
BITMAPS = st.one_of(
    st.sampled_from(
        [0, 1, 1 << 31, 1 << 32, 1 << 32 | 1, 3 << 32 | 4, (1 << 32) - 1, (1 << 64) - 1]
    ),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 32) - 1),
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(entries=st.lists(st.tuples(st.none() | WORDS, BITMAPS), min_size=1, max_size=4))
def test_hostile_extended_entries(entries: list[tuple[int | None, int]]) -> None:
    """As above with subclusters: the entry word (None: as it is) and the bitmap are free."""
    with tempfile.TemporaryDirectory() as directory:
        built = build_chain(Path(directory), ["64k:Z", "[ext cluster=16k] 16k:A 16k:B 16k:C 16k:D"])
        for cluster, (word, bitmap) in enumerate(entries):
            poke(built.active, cluster, peek(built.active, cluster)[0] if word is None else word,
                 bitmap)  # fmt: skip
        spans = [(start, 512) for cluster in range(len(entries)) for start in
                 range(cluster * 16384, (cluster + 1) * 16384, 2560)]  # fmt: skip
        assert_as_qemu(built.active, [(0, 65536), *spans])


def test_encrypted_data_is_not_handed_out(tmp_path: Path) -> None:
    path = tmp_path / "luks.qcow2"
    secret = ["--object", "secret,id=s,data=x"]
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu_img("create", "-q", "-f", "qcow2", *secret, "-o", options, path, "1M")
    with open_chain(path) as chain:
        with pytest.raises(Unsupported, match="encrypted"):
            read(chain.layers, 0, 512)
        with pytest.raises(Unsupported, match="encrypted"):
            list(pieces(chain.layers))
