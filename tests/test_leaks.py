"""`qchain leaks`: unreferenced clusters and what is in them; judged by qemu-img check."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import math
import os
import random
import struct
import tempfile
import zipfile
from pathlib import Path

import pytest
from cli_runner import command, run
from hypothesis import HealthCheck, given, settings

from fixtures.build import build_chain
from fixtures.generate import chains
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_check, qemu_img
from qchain.forensics.look import look_at
from qchain.hostfile import HostFile

K = 1 << 10
CLUSTER = 64 * K
PNG = b"\x89PNG\r\n\x1a\n"
TEXT = b"Meet me at the old bridge at ten.\n"


def image_of(tmp_path: Path) -> Path:
    """An image of whole clusters, so that what is appended is cluster aligned."""
    path = build_chain(tmp_path, ["256k:A 768k:-"]).active
    with path.open("r+b") as stream:
        stream.truncate(-(-path.stat().st_size // CLUSTER) * CLUSTER)
    return path


def leak(path: Path, content: bytes) -> int:
    """Append clusters that are counted as used, but that nothing refers to; their offset."""
    offset = path.stat().st_size
    image = path.read_bytes()
    (table,) = struct.unpack_from(">Q", image, 48)
    (block,) = struct.unpack_from(">Q", image, table)
    clusters = -(-len(content) // CLUSTER)
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content.ljust(clusters * CLUSTER, b"\0"))
        stream.seek(block + 2 * (offset // CLUSTER))
        stream.write(struct.pack(">H", 1) * clusters)
    return offset


def ranges_of(path: Path, *arguments: str | Path) -> list[dict[str, object]]:
    result = run("leaks", "--json", path, *arguments)
    assert result.code == 0 and result.err == ""
    found: list[dict[str, object]] = result.json["ranges"]
    for kind in ("leaked", "free", "slack"):
        total = sum(entry["length"] for entry in found if entry["kind"] == kind)  # type: ignore[misc]
        assert result.json[f"{kind}_bytes"] == total
    return found


def test_leaked_clusters_are_found_and_saved(tmp_path: Path) -> None:
    path = image_of(tmp_path)
    secret = PNG + os.urandom(100_000) + TEXT
    offset = leak(path, secret)
    assert qemu_check(path)["leaks"] == 2
    before = path.read_bytes()
    out = tmp_path / "out"
    (found,) = ranges_of(path, "--extract", out)
    assert (found["kind"], found["start"], found["length"]) == ("leaked", offset, 2 * CLUSTER)
    assert found["magic"] == [{"offset": offset, "name": "Portable Network Graphics file"}]
    (saved,) = out.iterdir()
    assert found["file"] == str(saved)
    assert saved.read_bytes() == before[offset:]
    assert saved.read_bytes().startswith(secret)
    assert path.read_bytes() == before  # nothing is repaired
    run("leaks", path, "--extract", out).fails(3)


def test_slack_behind_the_last_cluster(tmp_path: Path) -> None:
    path = image_of(tmp_path)
    end = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(TEXT * 100)
    info = json.loads(qemu_img("check", "-f", "qcow2", "--output=json", path).stdout)
    assert info["image-end-offset"] == end
    (found,) = ranges_of(path)
    assert (found["kind"], found["start"], found["length"]) == ("slack", end, len(TEXT) * 100)
    assert found["content"] == "text" and found["text"] == 1.0
    assert found["sample"] == TEXT.decode().strip()
    assert TEXT.decode().strip()[:20] in run("leaks", path).out


def test_free_clusters_keep_what_was_there(tmp_path: Path) -> None:
    """An internal snapshot is deleted: its clusters are free, and still hold its data."""
    path = build_chain(tmp_path, ["256k:A"]).active
    qemu_img("snapshot", "-c", "s", path)
    qemu_img("bench", "-w", "-f", "qcow2", "-c", "4", "-s", "64k", "--pattern=7", path)
    # By default qemu gives freed clusters back to the filesystem.
    options = f"driver=qcow2,pass-discard-snapshot=off,file.filename={path}"
    qemu_img("snapshot", "--image-opts", "-d", "s", options)
    free = [entry for entry in ranges_of(path) if entry["kind"] == "free"]
    assert sum(entry["length"] for entry in free) >= 256 * K  # type: ignore[misc]
    assert any(str(entry["sample"]).startswith("A0000000") for entry in free)


def test_free_where_there_is_no_refcount_block(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["[cluster=512] 4k:A"]).active
    end = path.stat().st_size
    reach = 512 * 256  # bytes that one refcount block of 512 bytes counts
    (table,) = struct.unpack_from(">Q", path.read_bytes(), 48)
    with path.open("r+b") as stream:
        stream.truncate(2 * reach + 1024)
        stream.seek(table + 16)  # the third block lies in the first cluster that it counts
        stream.write(struct.pack(">Q", 2 * reach))
        stream.seek(2 * reach)
        stream.write(b"\0\1")
    assert qemu_check(path) == {"corruptions": 0, "leaks": 0}
    found = [(entry["kind"], entry["start"], entry["length"]) for entry in ranges_of(path)]
    last = -(-end // 512) * 512
    assert found == [("free", last, 2 * reach - last), ("slack", 2 * reach + 512, 512)]


def refcounts_of(image: bytes, bits: int) -> dict[int, int]:
    """Host cluster to refcount, without the library; 8 bits and wider."""
    (table, clusters) = struct.unpack_from(">QI", image, 48)
    (cluster_bits,) = struct.unpack_from(">I", image, 20)
    size, width = 1 << cluster_bits, bits // 8
    out = {}
    for index in range(clusters * size // 8):
        (block,) = struct.unpack_from(">Q", image, table + 8 * index)
        for at in range(size // width if block else 0):
            raw = image[block + at * width : block + (at + 1) * width]
            out[index * (size // width) + at] = int.from_bytes(raw, "big")
    return out


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(chains(min_layers=1, max_layers=2))
def test_random_images_against_their_refcounts(specs: list[LayerSpec]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        built = build_chain(Path(scratch), specs)
        for path, spec in zip(built.paths, built.specs, strict=True):
            if spec.format == "raw":
                run("leaks", "-f", "raw", path).fails(4)
                continue
            image = path.read_bytes()
            counts = refcounts_of(image, spec.refcount_bits)
            size = spec.cluster_size
            found = ranges_of(path)
            clusters = range(-(-len(image) // size))
            used = [index for index in clusters if counts.get(index, 0)]
            named: dict[int, object] = {}
            for entry in found:
                start, length = int(str(entry["start"])), int(str(entry["length"]))
                assert start % size == 0 and length > 0
                named |= dict.fromkeys(
                    range(start // size, -(-(start + length) // size)), entry["kind"]
                )
            assert "leaked" not in named.values() and qemu_check(path)["leaks"] == 0
            assert {at for at, kind in named.items() if kind == "free"} == {
                at for at in clusters if at < used[-1] and not counts.get(at, 0)
            }
            assert {at for at, kind in named.items() if kind == "slack"} == {
                at for at in clusters if at > used[-1]
            }


@pytest.mark.parametrize(
    ("data", "summary"),
    [
        (bytes(200_000), "zero"),
        (TEXT * 3000, "text"),
        (os.urandom(200_000), "random or compressed"),
        (bytes(range(64)) * 3000, "data"),
        (os.urandom(4097), "random or compressed"),
        (b"\x80", "data"),
    ],
)
def test_looking(tmp_path: Path, data: bytes, summary: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 512 + data)
    with HostFile(path) as file:
        look = look_at(file, 512, len(data))
    assert look.summary == summary and look.zero == (not any(data))
    counts = [data.count(value) for value in set(data)]
    exact = -sum(count / len(data) * math.log2(count / len(data)) for count in counts)
    assert look.entropy == pytest.approx(exact, abs=1e-9)
    assert look.nonzero == len(data) - data.count(0)


def test_kinds_of_files_at_every_sector(tmp_path: Path) -> None:
    """A guest's file begins where its filesystem has a block, not where a cluster begins."""
    script = b"#!/bin/sh\necho harmless\n"
    picture = b"\xff\xd8\xff\xe0\0\x10JFIF\0"
    kinds = {
        512: ("ZIP", _zip()),
        5 * 512: ("JPEG", picture),
        7 * 512: ("gzip", gzip.compress(b"x")),
        9 * 512: ("Portable Network", PNG),
        11 * 512: ("Windows program", b"MZ\x90\0".ljust(60, b"\0") + b"\x80\0\0\0"),
        13 * 512: ("script", script),
        20 * 512: ("ELF", b"\x7fELF\2\1\1"),
        24 * 512: ("bzip2", bz2.compress(b"x")),
    }
    data = bytearray(b"\xff" * 512 + bytes(40 * 512))  # neither ones nor zeroes are a file
    for at, (_, head) in kinds.items():
        data[at : at + len(head)] = head
    data[14 * 512 + 1 : 14 * 512 + 1 + len(PNG)] = PNG  # no file begins amid a sector
    path = tmp_path / "file"
    path.write_bytes(b"?" * 4096 + data + script)
    with HostFile(path) as file:
        found = dict(look_at(file, 4096, len(data) + len(script)).magic)
    assert sorted(found) == [*(4096 + at for at in kinds), 4096 + len(data)]
    for at, (word, _) in kinds.items():
        assert word in found[4096 + at], found[4096 + at]


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("name", "content")
    return out.getvalue()


def test_noise_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(5).randbytes(64 << 20))
    with HostFile(path) as file:
        assert look_at(file, 0, 64 << 20).magic == ()


def test_text_of_what_begins(tmp_path: Path) -> None:
    path = image_of(tmp_path)
    offset = leak(path, bytes(1024) + PNG)
    lines = run("leaks", path).out.splitlines()
    assert lines[-1].split() == f"{offset + 1024} Portable Network Graphics file".split()


def test_looking_over_holes_and_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
        stream.seek(1 << 39)
        stream.write(PNG + TEXT)
    with HostFile(path) as file:
        look = look_at(file, 0, 1 << 41)
    assert look.nonzero == len(PNG + TEXT)
    assert look.magic == ((1 << 39, "Portable Network Graphics file"),)
    assert 0 <= look.entropy < 1e-6


def test_a_whole_image_without_leaks(tmp_path: Path) -> None:
    path = image_of(tmp_path)
    assert ranges_of(path) == []
    assert run("leaks", path).out == "0 B leaked, 0 B free, 0 B slack\n"


def test_progress_of_one_long_range(tmp_path: Path) -> None:
    path = image_of(tmp_path)
    with path.open("ab") as stream:
        for _ in range(16):
            stream.write(random.Random(1).randbytes(16 << 20))
    told = command("leaks", "--progress", "json", path)
    assert told.code == 0
    events = [json.loads(line) for line in told.err.splitlines() if line.startswith("{")]
    looking = [event for event in events if event["step"] == "looking"]
    (total,) = {event["total"] for event in looking}
    done = [event["done"] for event in looking]
    assert done == sorted(done) and done[-1] == total >= 256 << 20
    assert any(0 < each < total for each in done)
