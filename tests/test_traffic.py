"""Traffic of every way of merging: against a model of 512-byte cells, from qemu's maps."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fixtures.build import Chain, build_chain
from fixtures.generate import SMALL_CLUSTERS, chains, layer_specs
from fixtures.language import LayerSpec, resolve_size
from fixtures.oracle import qemu_io, qemu_map
from qchain.chain.chain import open_chain
from qchain.plan.traffic import Traffic, commit_granularity, count_traffic

SLOW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
SECTOR = 512


@dataclass
class Cells:
    """A layer as sets of sector numbers; past its end, up to `limit`, it is zero and allocated."""

    spec: LayerSpec
    path: Path
    sectors: int
    allocated: set[int]
    zero: set[int]

    @property
    def data(self) -> set[int]:
        return self.allocated - self.zero


def cells_of(path: Path, spec: LayerSpec, size: int, limit: int) -> Cells:
    allocated: set[int] = set()
    zero: set[int] = set()
    for extent in qemu_map(path, spec.format):
        cells = range(extent["start"] // SECTOR, (extent["start"] + extent["length"]) // SECTOR)
        if extent["depth"] == 0 and extent["present"]:
            if extent["data"]:
                allocated.update(cells)
            elif spec.format != "raw":  # a hole of a raw file is not allocated
                allocated.update(cells)
                zero.update(cells)
    tail = range(size // SECTOR, limit)
    return Cells(spec, path, size // SECTOR, allocated | set(tail), zero | set(tail))


def rounded(cells: set[int], granularity: int, limit: int) -> set[int]:
    """All cells below `limit` of every piece of `granularity` bytes that holds one of `cells`."""
    each = granularity // SECTOR
    pieces = {cell // each for cell in cells}
    return {c for piece in pieces for c in range(piece * each, (piece + 1) * each) if c < limit}


def union(sets: Sequence[set[int]]) -> set[int]:
    return set().union(*sets)


def visible_data(layers: Sequence[Cells]) -> set[int]:
    """Where the topmost layer that allocates, of these, holds data."""
    seen: set[int] = set()
    hidden: set[int] = set()
    for layer in layers:
        seen |= layer.data - hidden
        hidden |= layer.allocated
    return seen


def has_table(path: Path, table: int) -> bool:
    with path.open("rb") as file:
        head = file.read(104)
        if table >= struct.unpack_from(">I", head, 36)[0]:
            return False
        file.seek(struct.unpack_from(">Q", head, 40)[0] + 8 * table)
        return bool(struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00)


def zeroed(kept: Path, dirty: set[int], granularity: int, cluster: int, size: int) -> set[int]:
    """The pieces that a commit writes as zeroes: one extent without data, whole clusters."""
    out: set[int] = set()
    for extent in qemu_map(kept):
        if extent["data"]:
            continue
        end = min(extent["start"] + extent["length"], size // granularity * granularity)
        inside = range(-(-extent["start"] // granularity), end // granularity)
        run: list[int] = []
        for piece in [*inside, None]:
            if piece is not None and piece in dirty:
                run.append(piece)
                continue
            if run and run[0] * granularity % cluster == 0:
                out.update(run if (run[-1] + 1) * granularity % cluster == 0 else [])
            run = []
    return out


def model(layers: Sequence[Cells], target: int, below_size: int | None) -> Traffic:
    """The docstrings, cell by cell. `layers`: the group, the kept image first."""
    limit = layers[0].sectors
    inside = set(range(limit))
    mine = layers[target]
    above = union([layer.allocated for layer in layers[:target]]) & inside
    cluster = mine.spec.cluster_size
    raw = mine.spec.format == "raw"
    granularity = 65536 if raw else min(max(cluster, 4096), 65536)
    dirty = rounded(above, granularity, limit)
    copied = dirty
    if any(layer.zero & above for layer in layers[:target]):
        each = granularity // SECTOR
        pieces = {cell // each for cell in dirty}
        unit = granularity if raw else max(granularity, cluster)
        zero = zeroed(layers[0].path, pieces, granularity, unit, limit * SECTOR)
        copied = {cell for cell in dirty if cell // each not in zero}
    below = union([layer.allocated for layer in layers[target + 1 :]]) & inside
    own_unit = 4096 if raw else cluster // (32 if mine.spec.extended_l2 else 1)
    there = above | mine.allocated | (rounded(dirty, own_unit, limit) if target else set())
    moved = below - there
    reads = 0
    if target + 1 < len(layers):
        old_end = layers[target + 1].sectors
        looked = inside - there if below_size is None else moved
        reads = sum(cell < old_end for cell in looked)
        reads += sum(cell * SECTOR < (below_size or 0) for cell in looked)
    ended = {cell for cell in moved if cell * SECTOR >= (below_size or 0)}
    moved -= ended - visible_data(layers[target + 1 :])
    written = copied | moved
    each = (4096 if raw else cluster) // SECTOR
    clusters = {cell // each for cell in written} - {cell // each for cell in mine.data}
    tables: set[int] = set()
    if not raw:
        per_table = each * (cluster // (16 if mine.spec.extended_l2 else 8))
        tables = {cell // per_table for cell in written | dirty}
        tables = {table for table in tables if not has_table(mine.path, table)}
    return Traffic(
        commit_bytes=len(copied) * SECTOR if target else 0,
        commit_zero_bytes=len(dirty - copied) * SECTOR if target else 0,
        pull_bytes=len(moved) * SECTOR,
        pull_read_bytes=reads * SECTOR,
        extents=runs(dirty) + runs(moved),
        new_clusters=len(clusters),
        new_tables=len(tables),
    )


def runs(cells: set[int]) -> int:
    return sum(cell - 1 not in cells for cell in cells)


def assert_counts(built: Chain, low: int, high: int) -> list[Traffic]:
    """Every target of the group low..high (base first), with what is below as new backing."""
    longest = max(built.sizes[low : high + 1]) // SECTOR
    layers = [
        cells_of(built.paths[i], built.specs[i], built.sizes[i], longest)
        for i in range(high, low - 1, -1)
    ]
    below_size = built.sizes[low - 1] if low else None
    wanted = [model(layers, target, below_size) for target in range(len(layers))]
    with open_chain(built.paths[high], fmt=built.formats[high]) as chain:
        group = chain.layers[: high - low + 1]
        found = count_traffic(group, range(len(group)), chain.layers[len(group) :])
        alone = count_traffic(group, [len(group) - 1], chain.layers[len(group) :])
    assert alone == found[-1:]
    for target, (counted, model_says) in enumerate(zip(found, wanted, strict=True)):
        # A run is counted again where it crosses from one window into the next.
        assert 0 <= counted.extents - model_says.extents <= 8, (target, counted, model_says)
        counted.extents = model_says.extents
        assert counted == model_says, target
    return found


EXAMPLES = {
    "plain": ["64k:A 64k:B 64k:-", "32k:- 64k:C", "128k:- 1k:D"],
    "the middle owns most": ["[cluster=4k size=1M] 64k:A", "4k:- 1000k:B", "[cluster=4k] 8k:C"],
    "commit rounds out": ["256k:A", "[cluster=512] 512:B 100k:- 1k:C", "[cluster=4k] 8k:- 4k:D"],
    "large clusters below": ["[cluster=2M] 3M:A", "[cluster=4k] 64k:- 4k:B 1M:- 4k:C"],
    "raw below": ["[raw] 64k:A 256k:- 4k:B", "[cluster=512] 100k:- 512:C", "[cluster=4k] 4k:D"],
    "zero clusters": ["256k:A", "[cluster=4k] 64k:0 4k:- 4k:0", "[cluster=4k] 128k:- 4k:0 4k:B"],
    "only zero above": ["[size=256k] 64k:-", "[cluster=4k] 64k:0", "[cluster=512] 70k:0"],
    "data beside zero in a piece": ["[size=256k]", "[cluster=4k] 8k:A", "[cluster=4k] 8k:- 4k:0"],
    "short kept": ["1M:A", "300k:B", "[size=70k] 1k:C"],
    "short between": ["[size=1M] 900k:A", "[size=64k] 1k:B", "[size=1M] 32k:- 1k:C"],
    "kept image ends windows before the others": [
        "[cluster=4k size=20M] 9M:A",
        "[size=3M] 1M:- 64k:B",
        "[size=1M] 9k:- 9k:0",
    ],
    "short base, longer above": ["[cluster=4k] 9k:A", "[size=1M] 512k:- 64k:B", "[size=2M] 9k:C"],
    "extended": [
        "[ext] 2k:A 300k:-",
        "[ext cluster=16k] 512:- 512:B 9k:0",
        "[cluster=4k] 4k:- 4k:C",
    ],
    "compressed": ["[cluster=4k] 64k:a 64k:-", "[zstd] 64k:- 64k:b", "[cluster=4k] 4k:- 8k:c"],
    "new tables": ["[cluster=512 size=1M] 1k:A", "[cluster=512] 99k:- 1k:B 200k:0", "9k:- 1k:C"],
    "tables past a short target's end": ["[cluster=512 size=64k] 1k:A", "[size=1M] 900k:- 1k:B"],
    "several windows": [
        "[cluster=4k size=200M] 60M:- 8M:A 55M:- 1M:B",
        "[cluster=512 size=195M] 63M:- 2M:A 62M:- 1M:0 512:B",
        "[cluster=64k size=200M] 66M:- 1M:a 62M:~",
    ],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    built = build_chain(tmp_path, EXAMPLES[name])
    high = len(built.paths) - 1
    assert_counts(built, 0, high)
    assert_counts(built, max(0, high - 1), high)


@SLOW
@given(specs=chains(), data=st.data())
def test_mixed_chains(specs: list[LayerSpec], data: st.DataObject) -> None:
    low = data.draw(st.integers(0, len(specs) - 2))
    high = data.draw(st.integers(low + 1, len(specs) - 1))
    with tempfile.TemporaryDirectory() as directory:
        assert_counts(build_chain(Path(directory), specs), low, high)


@st.composite
def uniform(draw: st.DrawFn) -> list[LayerSpec]:
    """Layers of one size and one cluster size."""
    cluster = draw(st.sampled_from(SMALL_CLUSTERS))
    specs = [draw(layer_specs(None, 1 << 19, raw=False, cluster_size=cluster))]
    size = resolve_size(specs[0], None)
    for _ in range(draw(st.integers(1, 3))):
        layer = layer_specs(size, size, cluster_size=cluster)
        specs.append(draw(layer.filter(lambda spec: spec.size is None)))
    return specs


@SLOW
@given(specs=uniform())
def test_whole_clusters(specs: list[LayerSpec]) -> None:
    """Design, section 3: with one cluster size, what moves is |all| less |owned by the target|."""
    with tempfile.TemporaryDirectory() as directory:
        built = build_chain(Path(directory), specs)
        found = assert_counts(built, 0, len(specs) - 1)
        plain = all(
            spec.cluster_size in range(4096, 65537) and not spec.extended_l2 for spec in specs
        )
        zero_free = not any(run.kind in "0+~" for s in specs for p in s.passes for run in p)
        event(f"the simple law applies: {plain and zero_free}")
        if plain and zero_free and not any(spec.preallocation for spec in specs):
            owned = [0] * len(specs)
            for extent in qemu_map(built.active):
                if extent["present"]:
                    owned[extent["depth"]] += extent["length"]
            total = sum(owned)
            # Against the map of the chain: target t keeps what is its own in the final view.
            for target, traffic in enumerate(found):
                assert traffic.commit_bytes + traffic.pull_bytes == total - owned[target]


@pytest.mark.parametrize(
    ("line", "unit"),
    [("[raw] 64k:A", 65536), ("[cluster=512] 1k:A", 4096), ("[cluster=4k] 4k:A", 4096),
     ("[cluster=32k] 4k:A", 32768), ("64k:A", 65536), ("[cluster=2M] 4k:A", 65536)],
)  # fmt: skip
def test_commit_granularity(line: str, unit: int, tmp_path: Path) -> None:
    built = build_chain(tmp_path, [line])
    with open_chain(built.active, fmt=built.formats[0]) as chain:
        assert commit_granularity(chain.active) == unit


def test_one_table_is_counted_once(tmp_path: Path) -> None:
    """An L2 table of 2M clusters covers 512 GiB, a window of 64K clusters 8 GiB."""
    lines = ["[cluster=2M size=40G]", "[size=40G] 1G:- 64k:A", "[size=40G] 64k:- 64k:B"]
    built = build_chain(tmp_path, lines)
    with_far = build_chain(tmp_path / "far", [lines[0], "[size=40G] 64k:A", "[size=40G]"])
    qemu_io(with_far.paths[1], [f"write -q {gib}G 64k" for gib in (3, 9, 17, 33)], "qcow2")
    for chain_built in (built, with_far):
        with open_chain(chain_built.active) as chain:
            found = count_traffic(chain.layers, [2])[0]
        assert found.new_tables == 1
        assert found.new_clusters == (2 if chain_built is built else 5)


def test_progress(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["[size=1200M cluster=512] 1k:A", "600M:- 1k:B"])
    seen: list[tuple[int, int]] = []
    with open_chain(built.active) as chain:
        count_traffic(chain.layers, [0, 1], progress=lambda *at: seen.append(at))
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == (1200 << 20, 1200 << 20)
