"""`qchain map`, equal to `qemu-img map --output=json`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import run
from hypothesis import HealthCheck, given, settings
from qchain_cli.maptext import ROWS, json_lines

from fixtures.build import build_chain
from fixtures.generate import chains
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_img, qemu_map
from qchain.chain.chain import open_chain
from qchain.chain.extents import extents
from qchain.chain.resolve import Runs
from qchain.qcow2.entries import NO_HOST, Kind

CHAIN = ["256k:A 1M:- 256k:B 512k:-", "64k:- 256k:C 64k:0 128k:d 512k:-"]
TOP = "[ext cluster=16k zstd] 1M:- 4k:E 12k:- 32k:f 64k:0"
# What qemu-img 7.2 prints; `compressed` came with 8.2.
FIELDS = ("start", "length", "depth", "present", "zero", "data", "offset")


def as_qemu(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Extents with the fields of 7.2, equal neighbours joined.

    In images that seem preallocated qemu also asks the file for holes in the data, and calls
    them zero and data at once. Our map says what the image says: data.
    """
    out: list[dict[str, Any]] = []
    for extent in found:
        fields = {name: extent[name] for name in FIELDS if name in extent}
        fields["zero"] = fields["zero"] and not fields["data"]
        if out:
            last = out[-1]
            next_ = last | {"start": last["start"] + last["length"], "length": fields["length"]}
            if "offset" in last:
                next_["offset"] += last["length"]
            if next_ == fields:
                last["length"] += fields["length"]
                continue
        out.append(fields)
    return out


def mapped(*arguments: str | Path) -> list[dict[str, Any]]:
    """Our map in the words of 7.2. Of data, all that is compressed has no offset, and no other."""
    found = run("map", "--json", *arguments).json
    assert all(
        extent["compressed"] == (extent["data"] and "offset" not in extent) for extent in found
    )
    joined = as_qemu(found)
    assert len(joined) == len(found), "equal neighbours were not joined"
    return joined


@pytest.mark.parametrize("base", ["", "[raw] ", "[v2] "])
def test_a_chain(tmp_path: Path, base: str) -> None:
    path = build_chain(tmp_path, [base + CHAIN[0], CHAIN[1], TOP]).active
    assert mapped(path) == as_qemu(qemu_map(path))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(layers=chains(min_layers=1, max_layers=4))
def test_random_chains(layers: list[LayerSpec]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        chain = build_chain(Path(temporary), layers)
        fmt = chain.formats[-1]
        judge = as_qemu(qemu_map(chain.active, fmt))
        assert mapped("--format", fmt, chain.active) == judge


def test_this_image_alone(tmp_path: Path) -> None:
    chain = build_chain(tmp_path, [CHAIN[0], CHAIN[1]])
    chain.base.unlink()
    found = mapped("--layer", chain.active)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", chain.active)
    assert found == as_qemu(qemu_map(chain.active))
    assert {extent["depth"] for extent in found} == {0}


def test_extents_are_joined_across_windows(tmp_path: Path) -> None:
    """A reader's window of 512-byte clusters is 64 MiB: one extent spans several."""
    base = tmp_path / "base.raw"
    base.touch()
    with base.open("r+b") as file:
        file.truncate(300 << 20)
    path = tmp_path / "top.qcow2"
    options = "cluster_size=512"
    qemu_img(*("create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw"), path)
    found = run("map", "--json", path).json
    assert as_qemu(found) == as_qemu(qemu_map(path))
    assert len(found) == 1
    with open_chain(path) as chain:
        assert [extent.as_json() for extent in extents(chain.layers)] == found
        part = list(extents(chain.layers, 70 << 20, 200 << 20))
    assert [(extent.start, extent.end) for extent in part] == [(70 << 20, 200 << 20)]


def test_compressed_neighbours_are_one_extent(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["64k:A 640k:b 64k:-"]).active
    found = run("map", "--json", path).json
    assert as_qemu(found) == as_qemu(qemu_map(path))
    assert [extent["compressed"] for extent in found] == [False, True, False]


def test_a_disk_without_bytes(tmp_path: Path) -> None:
    path = tmp_path / "empty.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "0")
    assert run("map", "--json", path).json == []
    assert run("map", path).code == 0


def test_text_says_the_same(tmp_path: Path) -> None:
    path = build_chain(tmp_path, [CHAIN[0], CHAIN[1], TOP]).active
    lines = run("map", path).out.splitlines()
    judge = qemu_map(path)
    assert max(map(len, lines)) <= 80
    assert len(lines) == len(judge) + 1
    for line, extent in zip(lines[1:], judge, strict=True):
        start, length, depth, what, offset = line.split()
        assert [int(start), int(length), int(depth)] == [
            extent[name] for name in ("start", "length", "depth")
        ]
        assert (what == "compressed") == (extent["data"] and "offset" not in extent)
        assert (what in ("data", "compressed")) == extent["data"]
        assert (what == "nothing") == (not extent["present"])
        assert offset == str(extent.get("offset", "-"))


def test_text_in_bulk_is_that_of_one_at_a_time() -> None:
    """Numbers of every length, to the byte, and more rows than are made at once."""
    random = np.random.default_rng(7)
    count = 3 * ROWS + 5
    host = random.integers(0, 10 ** random.integers(1, 18, count), dtype=np.int64).astype(np.uint64)
    edges = [10**power + step for power in range(1, 18) for step in (-1, 0, 1)]
    host[: len(edges) + 1] = [0, *edges]
    host[random.random(count) < 0.3] = NO_HOST
    length = random.integers(1, 10 ** random.integers(1, 10, count), dtype=np.int64)
    length[: len(edges)] = edges
    depth = random.choice([0, 1, 9, 10, 4095], count).astype(np.int32)
    kinds = [Kind.UNALLOCATED, Kind.ZERO, Kind.DATA]
    kind = random.choice(kinds, count).astype(np.uint8)
    kind[host == NO_HOST] = random.choice([*kinds, Kind.COMPRESSED], int((host == NO_HOST).sum()))
    start = np.concatenate(([0], np.cumsum(length)[:-1]))
    table = Runs(start, length, depth, kind, host)
    expected = "".join(
        ",\n{ " + json.dumps(extent.as_json())[1:-1] + "}" for extent in table.extents()
    )
    assert json_lines(table).decode() == expected


def test_a_broken_entry_is_an_error(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["64k:A 64k:B"]).active
    content = bytearray(path.read_bytes())
    l2 = int.from_bytes(content[(l1 := int.from_bytes(content[40:48], "big")) : l1 + 8], "big")
    l2 &= (1 << 56) - 1
    content[l2 + 6] |= 2  # the host offset of guest cluster 0 is not aligned any more
    path.write_bytes(content)
    result = run("map", "--json", path)
    assert "guest offset 0" in result.fails(4)
    with pytest.raises(json.JSONDecodeError):
        json.loads(result.out)
