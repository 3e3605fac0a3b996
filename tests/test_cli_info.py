"""`qchain info`, judged by qemu-img."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
from cli_runner import on_terminal, run

from fixtures.build import build_chain
from fixtures.oracle import qemu_img, qemu_info, raw_of

FIELDS = {
    *("path", "format", "version", "virtual_size", "cluster_size", "file_size", "disk_size"),
    *("backing", "features", "encryption", "data_file", "compression", "extended_l2"),
    *("refcount_bits", "snapshots", "bitmaps", "clusters", "readable", "problems"),
}
LAYERS = {
    "plain": "64k:A 64k:- 64k:0 128k:b",
    "old": "[v2] 64k:A 64k:- 64k:c",
    "extended": "[ext cluster=16k zstd] 1k:A 3k:- 12k:- 16k:0 16k:b 4k:- 1k:0 11k:- 64k:-",
    "small": "[cluster=512 refcount=1] 2k:A 2k:- 1k:0 512:a 512:-",
    "lazy": "[lazy size=3M] 64k:A",
    "datafile": "[datafile] 64k:A 64k:- 64k:0",
}


@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_qemu_img(tmp_path: Path, name: str) -> None:
    path = build_chain(tmp_path, ["[raw size=1M] 64k:Z", LAYERS[name]]).active
    judge, found = qemu_info(path), run("info", "--json", path).json
    special = judge["format-specific"]["data"]
    assert found.keys() >= FIELDS
    assert found["path"] == str(path)
    assert found["virtual_size"] == judge["virtual-size"]
    assert found["disk_size"] == judge["actual-size"]
    assert found["file_size"] == path.stat().st_size
    assert found["cluster_size"] == judge["cluster-size"]
    assert found["version"] == {"0.10": 2, "1.1": 3}[special["compat"]]
    assert found["refcount_bits"] == special["refcount-bits"]
    assert found["compression"] == special["compression-type"]
    assert found["extended_l2"] == special.get("extended-l2", False)
    assert found["data_file"] == special.get("data-file")
    assert ("lazy refcounts" in found["features"]["compatible"]) == special.get(
        "lazy-refcounts", False
    )
    assert found["backing"] == {"name": "base.raw", "format": "raw"}
    assert (found["readable"], found["problems"]) == (True, [])


@pytest.mark.parametrize(
    ("layer", "data", "zero", "compressed", "unallocated"),
    [
        ("[size=320k] 64k:A 64k:- 64k:0 128k:b", 1, 1, 2, 1),
        ("[v2 size=222k] 64k:A 64k:- 64k:a 30k:-", 1, 0, 1, 2),
        # One written subcluster makes the whole cluster data; one zero subcluster, zero.
        ("[ext cluster=16k size=64k] 15872:- 512:A 16k:b 8k:- 512:0 7680:- 16k:-", 1, 1, 1, 1),
        ("[cluster=512 size=6k] 2k:A 2k:- 1k:0 512:a 512:-", 4, 2, 1, 5),
        ("[size=5G] 64k:- 64k:A", 1, 0, 0, 81919),
        ("[datafile size=192k] 64k:- 64k:A 64k:0", 1, 1, 0, 1),
    ],
)
def test_counts_clusters(
    tmp_path: Path, layer: str, data: int, zero: int, compressed: int, unallocated: int
) -> None:
    path = build_chain(tmp_path, ["1k:Z", layer]).active
    counts = run("info", "--json", path).json["clusters"]
    total = data + zero + compressed + unallocated
    expected = (total, data, zero, compressed, unallocated)
    names = ("total", "data", "zero", "compressed", "unallocated")
    assert tuple(counts[name] for name in names) == expected


def test_snapshots_and_bitmaps(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["64k:A 64k:-"]).active
    qemu_img("snapshot", "-c", "before the update", path)
    qemu_img("bitmap", "--add", "-g", "64k", "-f", "qcow2", path, "nightly")
    judge, found = qemu_info(path), run("info", "--json", path).json
    (snapshot,) = found["snapshots"]
    (expected,) = judge["snapshots"]
    for ours, theirs in (("id", "id"), ("name", "name"), ("vm_state_size", "vm-state-size")):
        assert snapshot[ours] == expected[theirs]
    assert snapshot["date_sec"] == expected["date-sec"]
    assert found["bitmaps"] == judge["format-specific"]["data"]["bitmaps"]
    text = run("info", path).out
    assert "before the update" in text and "nightly" in text


def test_raw(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["[raw] 64k:A 1M:-"]).active
    found = run("info", "--json", path).json
    assert found.keys() >= FIELDS
    assert (found["format"], found["virtual_size"]) == ("raw", (1 << 20) + 65536)
    assert found["disk_size"] == qemu_info(path, "raw")["actual-size"]
    for name in ("version", "cluster_size", "backing", "compression", "clusters"):
        assert found[name] is None


def test_never_opens_the_backing_file(tmp_path: Path) -> None:
    chain = build_chain(tmp_path, ["64k:A", "64k:-"])
    chain.base.unlink()
    result = run("info", "--json", chain.active)
    assert result.code == 0
    assert result.json["backing"]["name"] == "base.qcow2"


def test_what_cannot_be_read_is_still_described(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["64k:A", "64k:-"]).active
    with path.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 1 << 40))  # an incompatible feature nobody knows
    result = run("info", "--json", path)
    result.fails(4)
    assert result.json["readable"] is False
    assert any("40" in problem for problem in result.json["problems"])
    assert result.json["features"]["incompatible"] == ["bit 40"]
    assert result.json["virtual_size"] == 65536
    assert result.json["backing"] == {"name": "base.qcow2", "format": "qcow2"}


def test_a_map_that_cannot_be_read(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["64k:A 64k:B"]).active
    with path.open("r+b") as file:
        file.seek(40)
        (l1,) = struct.unpack(">Q", file.read(8))
        file.seek(l1)
        file.write(struct.pack(">Q", 1 << 40))
    result = run("info", "--json", path)
    result.fails(4)
    assert (result.json["readable"], result.json["clusters"]) == (False, None)
    assert result.json["virtual_size"] == 131072
    assert result.json["problems"]


@pytest.mark.parametrize(
    ("content", "fmt"),
    [(b"KDMV" + bytes(2000), "vmdk"), (b"QFI\xfb\0\0\0\x09" + bytes(500), "qcow2")],
)
def test_no_image_of_ours(tmp_path: Path, content: bytes, fmt: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    result = run("info", "--json", path)
    result.fails(4)
    assert result.json["format"] == fmt
    assert result.json["problems"] and not result.json["readable"]


def test_table_is_narrow_and_harmless(tmp_path: Path) -> None:
    name = "[red]evil\x1b[31m\nname " + "x" * 150 + ".qcow2"
    path = build_chain(tmp_path, ["64k:A", "64k:-"], ["base.qcow2", name]).active
    shown = name.replace("\x1b", "\\x1b").replace("\n", "\\n")
    assert f"image         {path.parent}/{shown}\n" in run("info", path).out
    out = on_terminal("info", path).out
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out and shown in out.replace("\n" + " " * 14, "")


def with_extension(path: Path, kind: int, data: bytes) -> None:
    """Put an extension before those that an image has."""
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[100:104], "big")
    new = struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")
    raw[length : length + 512] = new + raw[length : length + 512 - len(new)]
    path.write_bytes(raw)


@pytest.mark.parametrize("data", [b"", b"\x1b[31m odd \0 bytes", bytes(range(56)), b"8 bytes."])
def test_unknown_extensions_are_shown(tmp_path: Path, data: bytes) -> None:
    path = build_chain(tmp_path, ["[size=1M] 64k:A 64k:-", "64k:B"]).base
    before = qemu_info(path)["format-specific"], raw_of(path)
    with_extension(path, 0x51434E01, data)
    # qemu passes over it, and reads what it read before.
    assert (qemu_info(path)["format-specific"], raw_of(path)) == before
    found = run("info", "--json", path).json
    assert (found["readable"], found["problems"]) == (True, [])
    assert found["extensions"][0] == {
        "type": "0x51434e01",
        "name": None,
        "length": len(data),
        "data": data.hex(),
    }
    assert [each["name"] for each in found["extensions"][1:]] == ["feature names"]
    text = run("info", path).out
    assert (
        f"0x51434e01 (unknown), {len(data)} bytes: {data.hex()[:64]}"
        in " ".join(text.split()) + " "
    )
    assert "\x1b" not in text


def test_known_extensions_are_named(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["[size=1M] 64k:A", "[datafile] 64k:B"]).active
    qemu_img("bitmap", "--add", path, "b0")
    names = {each["name"] for each in run("info", "--json", path).json["extensions"]}
    assert names == {"backing format", "data file name", "feature names", "bitmaps"}
    assert "unknown" not in run("info", path).out


def test_a_header_that_ends_before_the_compression_type(tmp_path: Path) -> None:
    """104 bytes, as old versions of qemu wrote: what follows are extensions already."""
    path = build_chain(tmp_path, ["64k:A 64k:- 64k:c"]).active
    raw = bytearray(path.read_bytes())
    # Its first byte, 1, would be compression type zstd.
    raw[104:512] = (struct.pack(">II", 0x01020304, 8) + b"a word.." + bytes(512))[:408]
    raw[100:104] = struct.pack(">I", 104)
    path.write_bytes(raw)
    assert qemu_info(path)["format-specific"]["data"]["compression-type"] == "zlib"
    found = run("info", "--json", path).json
    assert (found["compression"], found["problems"]) == ("zlib", [])
    assert [each["type"] for each in found["extensions"]] == ["0x01020304"]
    digest = run("hash", "--json", path).json["digest"]
    assert digest == hashlib.sha256(raw_of(path)).hexdigest()


def test_unknown_features_that_do_not_forbid_reading(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["64k:A 64k:-"]).active
    before = raw_of(path)
    raw = bytearray(path.read_bytes())
    raw[80:96] = struct.pack(">QQ", 1 << 40 | 1, 1 << 33)
    # The image names one of them.
    at = raw.index(struct.pack(">I", 0x6803F857)) + 8
    raw[at : at + 48] = b"\1\x28" + b"from the future".ljust(46, b"\0")
    path.write_bytes(raw)
    assert raw_of(path) == before
    found = run("info", "--json", path).json
    assert found["features"] == {
        "incompatible": [],
        "compatible": ["lazy refcounts", "from the future"],
        "autoclear": ["bit 33"],
    }
    assert (found["readable"], found["problems"]) == (True, [])
    assert run("hash", "--json", path).json["digest"] == hashlib.sha256(before).hexdigest()
