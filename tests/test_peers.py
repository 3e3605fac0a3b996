"""The same content read by other programs, and images that another program than qemu-img made.

Where a reader agrees with qemu-img it is a second judge of qchain. Where it does not, the table
says how: their words for what they do not read, and their bugs by what they do.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from cli_runner import run
from test_cli_map import as_qemu, mapped
from test_luks import copied, ours, write
from test_luks import judged as decrypted

from fixtures.build import build_chain
from fixtures.oracle import qemu_check, qemu_img, qemu_info, qemu_io, qemu_map, raw_of, run_tool
from fixtures.peers import READERS, read_by

SAME, WRONG, HANGS = "same", "wrong content", "hangs"
# What they say of what they do not read.
UNKNOWN_BIT = "unsupported incompatible features flags"
NO_QCOW = "unsupported file signature"
END = "unable to read"
NO_NAME = "Invalid name"
NO_LENGTH = "read length must be non-negative|invalid number of bytes to read"

# Layers, base first; dissect.hypervisor 3.21; libqcow 20260703.
SHAPES: dict[str, tuple[list[str], str, str]] = {
    "plain": (["64k:A 64k:- 64k:B"], SAME, SAME),
    "version 2": (["[v2] 64k:A 64k:- 64k:B"], SAME, SAME),
    "part of a cluster at the end": (["[size=150k] 64k:A 64k:- 20k:B"], SAME, SAME),
    "clusters of 512": (["[cluster=512 size=200k] 64k:A 64k:- 64k:B"], SAME, SAME),
    "clusters of 2M": (["[cluster=2M size=5M] 2M:A 2M:- 1M:B"], SAME, SAME),
    "refcounts of 1 bit": (["[refcount=1] 64k:A 64k:- 64k:B"], SAME, SAME),
    "refcounts of 64 bits": (["[refcount=64] 64k:A 64k:- 64k:B"], SAME, SAME),
    "lazy refcounts": (["[lazy] 64k:A 64k:- 64k:B"], SAME, SAME),
    "preallocated": (["[prealloc=metadata size=1M] 64k:A"], SAME, SAME),
    "zero clusters": (["[size=512k] 64k:A 64k:- 64k:0 64k:B | 64k:0 64k:-"], SAME, SAME),
    # Their zero clusters let the backing file show through.
    "zero clusters over data": (["512k:A", "64k:0 64k:- 64k:+ 64k:B"], SAME, WRONG),
    "compressed, version 2": (["[v2] 64k:a 64k:- 64k:b"], SAME, SAME),
    # Of version 3 they read only the first compressed clusters right.
    "compressed": (["64k:a 64k:- 64k:b"], SAME, WRONG),
    "compressed, clusters of 1k": (["[cluster=1k size=64k] 3k:a 3k:- 4k:b"], SAME, WRONG),
    "compressed by zstd": (["[zstd] 64k:a 64k:- 64k:b"], SAME, UNKNOWN_BIT),
    # Their walk over subclusters does not advance, or goes below zero.
    "extended L2": (["[ext size=256k] 2k:A 4k:- 2k:0 56k:- 64k:B"], HANGS, UNKNOWN_BIT),
    "extended L2 over data": (["256k:Z", "[ext] 2k:A 62k:- 64k:B 64k:-"], NO_LENGTH, UNKNOWN_BIT),
    "chain": (["256k:Z", "64k:A 64k:- 64k:B", "64k:- 64k:C"], SAME, SAME),
    # What follows the 72 bytes of a header of version 2 they take for feature bits.
    "chain of version 2": (["[v2] 256k:Z", "[v2] 64k:A 64k:- 64k:B"], NO_NAME, SAME),
    "raw base": (["[raw] 256k:Z", "64k:A 64k:- 64k:B"], SAME, NO_QCOW),
    # Both stop at the end of the base.
    "short base": (["128k:Z", "[size=256k] 64k:- 64k:A 64k:-"], WRONG, END),
    "long base": (["512k:Z", "[size=256k] 64k:- 64k:A 64k:-"], SAME, SAME),
    "mixed cluster sizes": (
        ["[cluster=4k] 256k:Z", "64k:- 64k:A", "[cluster=512] 4k:- 1k:B"], SAME, SAME
    ),
    # They take no absolute name.
    "data file": (["[datafile] 64k:A 64k:- 64k:B"], NO_NAME, UNKNOWN_BIT),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, tmp_path: Path) -> None:
    layers, *expected = SHAPES[name]
    image = build_chain(tmp_path, layers).active
    judge = raw_of(image)
    assert run("hash", "--json", image).json["digest"] == hashlib.sha256(judge).hexdigest()
    for reader, outcome in zip(READERS, expected, strict=True):
        judged(read_by(reader, image), judge, outcome, reader)


def judged(found: bytes | str, judge: bytes, outcome: str, reader: str) -> None:
    if outcome == SAME:
        assert found == judge, (reader, found if isinstance(found, str) else "differs")
    elif outcome == WRONG:
        assert isinstance(found, bytes) and found != judge, (reader, "reads it right now")
    else:
        assert isinstance(found, str) and re.search(outcome, found), (reader, found)


def test_a_data_file_in_the_same_directory(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    run_tool(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", image.name, "1M"],
        cwd=tmp_path,
    )
    qemu_io(image, ["write -q -P 7 64k 100k"], "qcow2", cwd=tmp_path)
    raw = tmp_path / "judge"
    run_tool(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image.name, raw], cwd=tmp_path)
    judge = raw.read_bytes()
    assert judge.count(7) == 100 << 10
    assert run("hash", "--json", image).json["digest"] == hashlib.sha256(judge).hexdigest()
    judged(read_by("dissect", image), judge, SAME, "dissect")


def test_internal_snapshots(tmp_path: Path) -> None:
    image = build_chain(tmp_path, ["64k:A 64k:- 64k:B"]).active
    qemu_img("snapshot", "-c", "one", image)
    judge = raw_of(image)
    qemu_io(image, ["write -q -P 9 0 192k"], "qcow2")
    digest = run("hash", "--json", "--snapshot", "one", image).json["digest"]
    assert digest == hashlib.sha256(judge).hexdigest()
    judged(read_by("dissect", image, "one"), judge, SAME, "dissect")
    judged(read_by("libqcow", image, "one"), judge, "knows no snapshots", "libqcow")


def test_encryption_is_read_by_neither(tmp_path: Path) -> None:
    """One says so, the other hands out what is stored as if it were the content."""
    image = copied(tmp_path / "image.qcow2", size="1M")
    write(image, [("A", 0, 65536)])
    judge = decrypted(image)
    assert ours(image) == judge
    judged(read_by("dissect", image), judge, "not supported", "dissect")
    judged(read_by("libqcow", image), judge, WRONG, "libqcow")


# --- images that e2image makes: its own writer of qcow2, and its own reader ------------------


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
@pytest.mark.parametrize("block", [1024, 2048, 4096])
@pytest.mark.parametrize("what", ["-Q", "-Qa"], ids=["metadata", "data too"])
def test_images_of_e2image(kind: str, block: int, what: str, tmp_path: Path) -> None:
    """Version 2, no L2 table shared, one or two clusters leaked: as qemu-img finds them too."""
    disk, image, raw = (tmp_path / name for name in ("disk", "image.qcow2", "raw"))
    (tmp_path / "files").mkdir()
    for number in range(40):
        body = hashlib.sha256(bytes([number])).digest() * 97 * (number % 5)
        (tmp_path / "files" / f"file{number}").write_bytes(body)
    disk.write_bytes(b"")
    with disk.open("r+b") as file:
        file.truncate(24 << 20)
    run_tool(["mke2fs", "-q", "-t", kind, "-b", str(block), "-d", tmp_path / "files", disk])
    run_tool(["e2image", what, disk, image])
    run_tool(["e2image", "-r", image, raw])
    judge = raw_of(image)
    assert raw.read_bytes() == judge
    assert run("hash", "--json", image).json["digest"] == hashlib.sha256(judge).hexdigest()
    assert mapped(image) == as_qemu(qemu_map(image))
    info = run("info", "--json", image).json
    assert (info["version"], info["cluster_size"], info["problems"]) == (2, block, [])
    assert info["virtual_size"] == qemu_info(image)["virtual-size"]
    assert info["backing"] is None and info["encryption"] is None
    report = run("check", "--json", image)
    found = json.loads(report.out)
    assert {name: found[name] for name in ("corruptions", "leaks")} == qemu_check(image)
    for reader in READERS:
        judged(read_by(reader, image), judge, SAME, reader)
