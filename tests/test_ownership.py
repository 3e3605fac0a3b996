"""Owned and shadowed bytes, cluster counts and shares of regions: against qemu's maps."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.bigmeta import build_big_chain
from fixtures.build import Chain, build_chain
from fixtures.generate import chains
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_img, qemu_map, raw_of
from qchain.chain.chain import open_chain
from qchain.chain.counts import count_clusters, owned_by_region
from qchain.chain.layer import Qcow2Layer
from qchain.chain.ownership import Ownership, ownership

SLOW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))

EXAMPLES = {
    "plain": ["64k:A 64k:B 64k:-", "32k:- 64k:C"],
    "zero clusters own": ["[cluster=4k] 64k:A", "[cluster=4k] 4k:0 4k:+ 4k:. 4k:~"],
    "nothing allocated": ["[size=1M]", "[size=1M]"],
    "raw base with holes": ["[raw] 64k:A 128k:- 4k:B 60k:-", "2k:- 512:B 90k:- 512:C"],
    "raw base, odd size": ["[raw size=99840] 64k:A 1k:-", "[cluster=4k] 8k:- 512:B"],
    "short between": ["256k:A", "[size=64k] 16k:B", "[size=256k] 32k:- 1k:C"],
    "short and empty between": ["256k:A", "[size=64k]", "[size=256k]"],
    "two short between": ["1M:A", "[size=512k]", "[size=99k] 1k:B", "[size=700k]", "[size=2M]"],
    "long below": ["4M:A", "[size=2M] 1M:B", "[size=70k] 1k:- 1k:B"],
    "long, unaligned below": ["[cluster=64k] 9M:A", "[cluster=512 size=2101760] 1k:B"],
    "long raw below": ["[raw size=9M] 5M:A", "[size=4196864] 1k:B"],
    "long below a long one": ["[cluster=2M] 9M:A", "[size=3M] 1M:B", "[cluster=4k size=2049k]"],
    "unaligned sizes": ["[cluster=4k] 5k:A", "[cluster=512] 4k:- 1k:B", "[cluster=64k size=9k]"],
    "extended": ["256k:A", "[ext zstd] 64k:a 2k:B 2k:0 2k:~ 58k:- | 128k:- 64k:~"],
    "extended, unaligned below": ["[ext] 300k:A", "[cluster=512 size=70656] 512:- 512:B"],
    "compressed": ["[zstd cluster=4k] 64k:a 1k:b", "[cluster=512] 5k:c 512:0"],
    "several windows": [
        "[cluster=4k size=200M] 60M:- 8M:A 55M:- 8M:B",
        "[cluster=512 size=195M] 63M:- 2M:A 62M:- 1M:0 512:B",
        "[cluster=64k size=200M] 66M:- 1M:a 62M:~",
    ],
    "empty disk": ["[size=0]"],
}  # fmt: skip


def counted(path: Path, fmt: str, formats: list[str]) -> list[int]:
    """Bytes that each layer of the chain of `path` gives it: qemu's map, added up.

    `formats`: active first. Zero clusters are allocated; the holes of a raw file are not.
    """
    sums = [0] * len(formats)
    for extent in qemu_map(path, fmt):
        depth = extent["depth"]
        if extent["present"] and (extent["data"] or formats[depth] != "raw"):
            sums[depth] += extent["length"]
    return sums


def expected(built: Chain) -> list[Ownership]:
    formats = list(reversed(built.formats))
    owned = counted(built.active, formats[0], formats)
    allocated = [
        counted(path, fmt, [fmt] + ["other"] * len(formats))[0]
        for path, fmt in zip(reversed(built.paths), formats, strict=True)
    ]
    return [Ownership(*pair) for pair in zip(allocated, owned, strict=True)]


def assert_counts(built: Chain) -> None:
    wanted = expected(built)
    with open_chain(built.active, fmt=built.formats[-1]) as chain:
        found = ownership(chain.layers)
    assert found == wanted
    assert all(each.owned + each.shadowed == each.allocated for each in found)
    assert all(each.shadowed >= 0 for each in found)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    assert_counts(build_chain(tmp_path, EXAMPLES[name]))


@SLOW
@given(specs=chains(min_layers=1))
def test_random_chain(specs: list[LayerSpec]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        assert_counts(build_chain(Path(directory), specs))


def test_owned_bytes_are_what_the_guest_loses_without_the_layer(tmp_path: Path) -> None:
    """Independent of any map: wipe what a layer stores, and see how many bytes change."""
    specs = [
        "[cluster=4k] 300k:A",
        "[cluster=4k] 8k:- 100k:B",
        "[cluster=512] 1k:- 9k:C 90k:- 1k:D",
    ]
    built = build_chain(tmp_path, specs)
    with open_chain(built.active) as chain:
        found = [each.owned for each in ownership(chain.layers)]
    content = raw_of(built.active)
    for path, owned in zip(reversed(built.paths), found, strict=True):
        kept = path.read_bytes()
        with path.open("r+b") as file:
            for extent in qemu_map(path):
                if extent["depth"] == 0 and extent["data"]:
                    file.seek(extent["offset"])
                    file.write(b"\xff" * extent["length"])
        changed = np.frombuffer(raw_of(built.active), np.uint8) != np.frombuffer(content, np.uint8)
        path.write_bytes(kept)
        assert int(np.count_nonzero(changed)) == owned, path.name


def test_big_sparse_chain(tmp_path: Path) -> None:
    images = build_big_chain(tmp_path, 24 << 30, fills=(0.2, 0.05, 0.01), run_length=8)
    owned = [0] * len(images)
    for extent in qemu_map(images[-1].path):
        if extent["present"]:
            owned[extent["depth"]] += extent["length"]
    seen: list[tuple[int, int]] = []
    with open_chain(images[-1].path) as chain:
        found = ownership(chain.layers, progress=lambda *at: seen.append(at))
    assert [each.allocated for each in found] == [i.allocated_bytes for i in reversed(images)]
    assert [each.owned for each in found] == owned
    assert seen == sorted(seen)
    assert seen[-1] == (24 << 30, 24 << 30)


@SLOW
@given(specs=chains(min_layers=1), regions=st.integers(1, 40))
def test_regions(specs: list[LayerSpec], regions: int) -> None:
    """Every region's share of every layer is what qemu's map says of that range."""
    with tempfile.TemporaryDirectory() as directory:
        built = build_chain(Path(directory), specs)
        size = built.sizes[-1]
        formats = list(reversed(built.formats))
        wanted = np.zeros((len(specs), regions))
        for extent in qemu_map(built.active, formats[0]):
            if extent["present"] and (extent["data"] or formats[extent["depth"]] != "raw"):
                for region in range(regions):
                    low = max(extent["start"], region * size / regions)
                    high = min(extent["start"] + extent["length"], (region + 1) * size / regions)
                    wanted[extent["depth"], region] += max(0.0, high - low)
        with open_chain(built.active, fmt=formats[0]) as chain:
            found = owned_by_region(chain.layers, regions)
            assert np.allclose(found, wanted, rtol=0, atol=1e-3)
            sums = [each.owned for each in ownership(chain.layers)]
        assert np.allclose(found.sum(axis=1), sums)


@SLOW
@given(specs=chains(min_layers=1, max_layers=2))
def test_cluster_counts(specs: list[LayerSpec]) -> None:
    """Clusters by state, from qemu's map of the image alone; compressed: data without offset."""
    with tempfile.TemporaryDirectory() as directory:
        built = build_chain(Path(directory), specs)
        if built.formats[-1] == "raw":
            return
        cluster = built.specs[-1].cluster_size
        total = -(-built.sizes[-1] // cluster)
        state = np.zeros(total, int)  # 3 compressed, 2 data, 1 zero, 0 unallocated
        for extent in qemu_map(built.active):
            if extent["depth"] == 0 and extent["present"]:
                value = 1 if not extent["data"] else 2 if "offset" in extent else 3
                low = extent["start"] // cluster
                high = -(-(extent["start"] + extent["length"]) // cluster)
                state[low:high] = np.maximum(state[low:high], value)
        with open_chain(built.active) as chain:
            assert isinstance(chain.active, Qcow2Layer)
            found = count_clusters(chain.active)
        unallocated, zero, data, compressed = np.bincount(state, minlength=4).tolist()
        assert (found.total, found.unallocated, found.zero, found.data, found.compressed) == (
            total, unallocated, zero, data, compressed,
        )  # fmt: skip
        assert found.invalid == 0


def test_external_data_file(tmp_path: Path) -> None:
    assert_counts(build_chain(tmp_path, ["[datafile] 64k:A 64k:0 64k:- 64k:B", "64k:- 1k:C"]))


def test_reading_changes_nothing(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["[raw] 64k:A", "1k:B"])
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in built.paths]
    for path in built.paths:
        path.chmod(0o444)
    with open_chain(built.active) as chain:
        ownership(chain.layers)
    assert before == [(path.read_bytes(), path.stat().st_mtime_ns) for path in built.paths]
    assert sorted(tmp_path.iterdir()) == sorted(built.paths)
    qemu_img("check", "-q", "-f", "qcow2", built.active)
