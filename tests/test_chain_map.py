"""The map of a chain is the one that `qemu-img map` gives, field for field."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from fixtures.bigmeta import build_big_chain
from fixtures.build import Chain, build_chain
from fixtures.generate import chains
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_map
from qchain.chain.chain import open_chain
from qchain.chain.extent import Extent
from qchain.chain.extents import extents
from qchain.chain.layer import Layer
from qchain.chain.resolve import runs

SLOW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))

EXAMPLES = {
    "plain": ["64k:A 64k:B 64k:-", "32k:- 64k:C"],
    "all kinds": ["64k:A 64k:b 64k:0 64k:+ 64k:. 64k:~ 64k:-", "[cluster=4k] 4k:0 4k:+ 4k:. 4k:~"],
    "nothing allocated": ["[size=1M]", "[size=1M]"],
    "finer above": ["256k:A", "[cluster=512] 512:- 512:B 1k:0 512:-", "[cluster=4k] 8k:- 4k:C"],
    "coarser above": ["[cluster=512] 512:A 1k:- 512:B 63k:-", "[cluster=64k size=256k] 64k:-"],
    "raw base": ["[raw] 64k:A 128k:- 1k:B 512:-", "2k:- 512:B"],
    "raw base, odd size": ["[raw size=99840] 64k:A 1k:-", "[cluster=4k] 8k:- 512:B"],
    "raw base, longer above": ["[raw] 64k:A 9k:-", "[size=300k] 200k:- 512:B"],
    "short between": ["256k:A", "[size=64k] 16k:B", "[size=256k] 32k:- 1k:C"],
    "short and empty between": ["256k:A", "[size=64k]", "[size=256k]"],
    "two short between": ["1M:A", "[size=512k]", "[size=99k] 1k:B", "[size=700k]", "[size=2M]"],
    "short base": ["[cluster=4k] 9k:A", "[size=1M] 512k:- 64k:B"],
    "long below": ["1M:A", "[size=70k] 1k:- 1k:B"],
    "unaligned sizes": ["[cluster=4k] 5k:A", "[cluster=512] 4k:- 1k:B", "[cluster=64k size=9k]"],
    "extended": ["256k:A", "[ext zstd] 64k:a 2k:B 2k:0 2k:~ 58k:- | 128k:- 64k:~"],
    "extended base": ["[ext] 2k:A 2k:- 4k:0 120k:- 2k:B", "[size=256k]"],
    "extended holes above": ["[ext size=64k] 2k:A 2k:- 2k:0", "[ext] 4k:- 2k:A 2k:- 6k:0"],
    "compressed": ["[zstd cluster=4k] 64k:a 1k:b", "[cluster=512] 5k:c 512:0"],
    "compressed neighbours of layers": ["128k:a", "64k:b 64k:-", "[size=256k] 128k:- 64k:c"],
    "v2 zeroes": ["[cluster=4k] 64k:A", "[v2 cluster=4k] 4k:0 1k:+ 8k:0 4k:~ 4k:."],
    "zero over data": ["[cluster=4k] 64k:A", "[cluster=4k] 64k:B | 8k:0 8k:+ 8k:~ 8k:."],
    "preallocated": ["[prealloc=metadata] 64k:A 64k:-", "[ext prealloc=metadata] 64k:-"],
    "preallocated zeroes": ["[prealloc=metadata] 256k:- | 128k:0 64k:~"],
    "data file": ["[datafile] 64k:A 64k:0 64k:B | 64k:~", "[size=256k] 1k:B"],
    "large clusters": ["[cluster=2M] 1M:A 2M:- 1M:B", "[cluster=512 v2] 512:C 1M:- 1k:D"],
    # 512-byte clusters: windows of 64 MiB; the data crosses their borders.
    "several windows": [
        "[cluster=4k size=200M] 60M:- 8M:A 55M:- 8M:B",
        "[cluster=512 size=195M] 63M:- 2M:A 62M:- 1M:0 512:B",
        "[cluster=64k size=200M] 66M:- 1M:a 62M:~",
    ],
    "empty disk": ["[size=0]"],
}  # fmt: skip


def join(parts: Iterable[Extent]) -> list[dict[str, Any]]:
    """Extents as qemu-img prints them: without `compressed` (7.2), equal neighbours joined."""
    out: list[dict[str, Any]] = []
    for part in parts:
        fields = part.as_json()
        assert fields.pop("compressed") <= fields["data"]  # type: ignore[operator]
        if out:
            last = out[-1]
            assert fields["start"] == last["start"] + last["length"], "a gap, or out of order"
            follows = {**last, "start": fields["start"], "length": fields["length"]}
            if "offset" in last:
                follows["offset"] += last["length"]
            if follows == fields:
                last["length"] += fields["length"]
                continue
        out.append(fields)
    return out


def of_runs(layers: Sequence[Layer], start: int = 0, end: int | None = None) -> Iterable[Extent]:
    return itertools.chain.from_iterable(table.extents() for table in runs(layers, start, end))


def qemus_map(path: Path, fmt: str = "qcow2") -> list[dict[str, Any]]:
    """qemu-img's map, joined by its own rule: its requests end at 1 GiB and at tables.

    In images that seem preallocated qemu also asks the file for holes in the data, and calls
    them zero and data at once. Our map says what the image says: data.
    """
    return join(
        Extent(e["start"], e["length"], e["depth"], e["present"], e["zero"] and not e["data"],
               e["data"], False, e.get("offset"))
        for e in qemu_map(path, fmt)
        if e["length"]  # an empty disk is one extent of nothing to qemu-img
    )  # fmt: skip


def assert_maps_equal(built: Chain) -> None:
    for path, fmt in zip(built.paths, built.formats, strict=True):
        expected = qemus_map(path, fmt)
        with open_chain(path, fmt=fmt) as chain:
            assert join(of_runs(chain.layers)) == expected, path.name
            found = list(extents(chain.layers))
        assert join(found) == expected, path.name
        for before, after in itertools.pairwise(found):
            assert not is_continued(before, after), (before, after)


def is_continued(before: Extent, after: Extent) -> bool:
    """Whether `after` should have been part of `before`."""
    offset = None if before.offset is None else before.offset + before.length
    return replace(before, start=after.start, length=after.length, offset=offset) == after


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    assert_maps_equal(build_chain(tmp_path, EXAMPLES[name]))


@SLOW
@given(specs=chains(min_layers=1))
def test_random_chain(specs: list[LayerSpec]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        assert_maps_equal(build_chain(Path(directory), specs))


def test_part_of_a_map(tmp_path: Path) -> None:
    """A map of [start, end) is the whole map, cut; offsets move along."""
    built = build_chain(
        tmp_path, ["[cluster=4k] 3M:A 100k:- 1M:B", "[ext] 1M:- 2k:C 4k:- 64k:0 1M:- 999k:D"]
    )
    whole = qemus_map(built.active, "qcow2")
    size = built.sizes[-1]
    middle = 2 << 20
    spans = [(0, size), (512, 513), (middle, 3 << 20), (1000, size), (size, size), (4096, 4096)]
    spans += [(middle - 1, middle + 1), (1 << 20, 9 << 20)]
    with open_chain(built.active) as chain:
        for start, end in spans:
            expected = []
            for extent in whole:
                low = max(start, extent["start"])
                high = min(end, extent["start"] + extent["length"])
                if low < high:
                    cut = {**extent, "start": low, "length": high - low}
                    if "offset" in cut:
                        cut["offset"] += low - extent["start"]
                    expected.append(cut)
            assert join(of_runs(chain.layers, start, end)) == expected, (start, end)
            assert join(extents(chain.layers, start, end)) == expected, (start, end)


def test_big_sparse_chain(tmp_path: Path) -> None:
    """Several windows, 100 thousand clusters: which layer holds what, and where."""
    images = build_big_chain(tmp_path, 24 << 30, fills=(0.2, 0.05, 0.01), run_length=8)
    active = images[-1].path
    with open_chain(active) as chain:
        found = join(extents(chain.layers))
    assert found == qemus_map(active)
    assert {e["depth"] for e in found if e["present"]} == {0, 1, 2}
