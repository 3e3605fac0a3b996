"""Traffic of every way of merging: against a model of 512-byte cells, from qemu's maps."""

from __future__ import annotations

import itertools
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
from fixtures.shadow import shadow_points
from qchain.chain.chain import open_chain
from qchain.plan.traffic import Traffic, commit_granularity, count_traffic

SLOW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
SECTOR = 512


@dataclass
class Cells:
    """A layer as sets of sector numbers; past its end, up to `limit`, it is zero and allocated.

    `breaks`: where qemu's block status of this layer begins anew, within one kind.
    """

    spec: LayerSpec
    path: Path
    sectors: int
    allocated: set[int]
    zero: set[int]
    breaks: set[int]

    @property
    def data(self) -> set[int]:
        return self.allocated - self.zero


def cells_of(path: Path, spec: LayerSpec, size: int, limit: int) -> Cells:
    allocated: set[int] = set()
    zero: set[int] = set()
    breaks: set[int] = set()
    for extent in qemu_map(path, spec.format):
        cells = range(extent["start"] // SECTOR, (extent["start"] + extent["length"]) // SECTOR)
        if extent["depth"] == 0 and extent["present"]:
            breaks.add(cells[0])
            if extent["data"] and "offset" not in extent:  # compressed: 7.2 has no word for it
                breaks.update(c for c in cells if c * SECTOR % spec.cluster_size == 0)
            if extent["data"]:
                allocated.update(cells)
            elif spec.format != "raw":  # a hole of a raw file is not allocated
                allocated.update(cells)
                zero.update(cells)
    if spec.format == "qcow2":
        breaks.update(range(0, size // SECTOR, table_sectors(spec)))
        breaks.update(host_breaks(path, spec, size))
    tail = range(size // SECTOR, limit)
    return Cells(spec, path, size // SECTOR, allocated | set(tail), zero | set(tail), breaks)


def table_sectors(spec: LayerSpec) -> int:
    """What one L2 table covers."""
    return spec.cluster_size // SECTOR * (spec.cluster_size // (16 if spec.extended_l2 else 8))


def host_breaks(path: Path, spec: LayerSpec, size: int) -> set[int]:
    """Where clusters with a place in the file begin or do not follow each other (extended L2).

    Subclusters that are not allocated may lie in such a cluster, and `qemu-img map` is silent.
    """
    if not spec.extended_l2:
        return set()
    cluster, image = spec.cluster_size, path.read_bytes()
    (l1,) = struct.unpack_from(">Q", image, 40)
    hosts: list[int] = []
    for number in range(-(-size // cluster)):
        table, index = divmod(number, cluster // 16)
        (at,) = struct.unpack_from(">Q", image, l1 + 8 * table)
        at &= 0x00FFFFFFFFFFFE00
        hosts.append(struct.unpack_from(">Q", image, at + 16 * index)[0] if at else 0)
    hosts = [host & 0x00FFFFFFFFFFFE00 for host in hosts]
    return {
        number * cluster // SECTOR
        for number in range(1, len(hosts))
        if hosts[number] != (hosts[number - 1] and hosts[number - 1] + cluster)
    }


def rounded(cells: set[int], granularity: int, limit: int) -> set[int]:
    """All cells below `limit` of every piece of `granularity` bytes that holds one of `cells`."""
    each = granularity // SECTOR
    pieces = {cell // each for cell in cells}
    return {c for piece in pieces for c in range(piece * each, (piece + 1) * each) if c < limit}


def union(sets: Sequence[set[int]]) -> set[int]:
    return set().union(*sets)


def has_table(path: Path, table: int) -> bool:
    with path.open("rb") as file:
        head = file.read(104)
        if table >= struct.unpack_from(">I", head, 36)[0]:
            return False
        file.seek(struct.unpack_from(">Q", head, 40)[0] + 8 * table)
        return bool(struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00)


def zeroed(
    kept: Path, chain: Sequence[Cells], dirty: set[int], granularity: int, cluster: int, size: int
) -> set[int]:
    """The pieces that a commit writes as zeroes: one extent without data, whole clusters.

    `chain`: the kept image and all below it. An extent is no longer than the block status of
    any layer that is asked: those down to the one that decides.
    """
    out: set[int] = set()
    # Of what is dirty without a gap 16 MiB are taken on at once.
    begins: dict[int, int] = {}
    for piece in sorted(dirty):
        begins[piece] = begins.get(piece - 1, piece)
    batches = {b * granularity for b in dirty if (b - begins[b]) * granularity % (16 << 20) == 0}
    for extent in qemu_map(kept):
        if extent["data"]:
            continue
        low, high = extent["start"], min(extent["start"] + extent["length"], size)
        asked = chain[: extent["depth"] + 1]
        cuts = {b * SECTOR for cells in asked for b in cells.breaks if low < b * SECTOR < high}
        edges = sorted({low, high} | cuts | {b for b in batches if low < b < high})
        for start, end in itertools.pairwise(edges):
            end = min(end, size // granularity * granularity)
            inside = range(-(-start // granularity), end // granularity)
            run: list[int] = []
            for piece in [*inside, None]:
                if piece is not None and piece in dirty:
                    run.append(piece)
                    continue
                if run and run[0] * granularity % cluster == 0:
                    out.update(run if (run[-1] + 1) * granularity % cluster == 0 else [])
                run = []
    return out


@dataclass
class Rebased:
    """Sectors that a rebase reads (of both views), writes as data, writes as zeroes."""

    read: int
    data: set[int]
    zeroes: set[int]


def rebased(
    below: Sequence[Cells], there: set[int], mine: Cells, old: bytes, new: bytes | None, limit: int
) -> Rebased:
    """qemu 7.2, step by step. `there`: what the target allocates; `below`: the group below it."""
    out = Rebased(0, set(), set())
    old_end, new_end = below[0].sectors, 0 if new is None else len(new) // SECTOR
    each = own_unit(mine.spec) // SECTOR
    there = set(there)
    at = 0
    while at < limit:
        if at in there:
            at += 1
            continue
        end = at + 1
        most = min(limit, at + 4096)
        while end < most and end not in there and end not in mine.breaks:
            end += 1
        found = new is None
        for layer in below if new is not None else ():
            if at >= layer.sectors:
                found = True
                break
            found = at in layer.allocated
            most, end = min(end, layer.sectors), at + 1
            while end < most and (end in layer.allocated) == found and end not in layer.breaks:
                end += 1
            if found:
                break
        if found:
            for view_end in (old_end, new_end):
                if at < view_end:
                    end = min(end, view_end)
                    out.read += end - at
            for sector in range(at, end):
                place = slice(sector * SECTOR, (sector + 1) * SECTOR)
                before = old[place].ljust(SECTOR, b"\0")
                if before != (new or b"")[place].ljust(SECTOR, b"\0"):
                    (out.data if at < old_end else out.zeroes).add(sector)
                    there.update(range(sector // each * each, (sector // each + 1) * each))
        at = end
    return out


def own_unit(spec: LayerSpec) -> int:
    if spec.format == "raw":
        return 4096
    return spec.cluster_size // (32 if spec.extended_l2 else 1)


def then_there(layers: Sequence[Cells], target: int, limit: int) -> set[int]:
    """What the target allocates of its own when it is pulled into, as long as the kept image."""
    mine = layers[target]
    end, each = mine.sectors, own_unit(mine.spec) // SECTOR
    if end >= limit:
        return mine.allocated
    own = {cell for cell in mine.allocated if cell < end}
    last = set(range(end // each * each, -(-end // each) * each))
    if layers[target + 1].sectors > end:
        return own | last | set(range(end, limit))
    return own | (last if end - 1 in own else set())


def model(
    layers: Sequence[Cells], under: Sequence[Cells], target: int, old: bytes, new: bytes | None
) -> tuple[Traffic, int]:
    """The docstrings, cell by cell, by the contents; and what lies between, by the maps.

    `layers`: the group, the kept image first. `old`, `new`: what it and the new backing read as.
    """
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
        chain = [*layers, *under]
        zero = zeroed(layers[0].path, chain, pieces, granularity, unit, limit * SECTOR)
        copied = {cell for cell in dirty if cell // each not in zero}
    done, between = Rebased(0, set(), set()), 0
    as_data: set[int] = set()
    if target + 1 < len(layers):
        below = layers[target + 1 :]
        there = above | then_there(layers, target, limit)
        if target:
            there |= rounded(dirty, own_unit(mine.spec), limit)
        between = len((union([layer.allocated for layer in below]) & inside) - there)
        done = rebased(below, there, mine, old, new, limit)
        partly = -(-below[0].sectors * SECTOR // own_unit(mine.spec)) * own_unit(mine.spec)
        old_zero = {c for c in done.zeroes if mine.spec.version < 3 or c * SECTOR < partly}
        as_data = done.data | old_zero
    each = (4096 if raw else cluster) // SECTOR
    clusters = {cell // each for cell in copied | as_data} - {cell // each for cell in mine.data}
    tables: set[int] = set()
    if not raw:
        per_table = table_sectors(mine.spec)
        tables = {cell // per_table for cell in as_data | done.zeroes | dirty}
        tables = {table for table in tables if not has_table(mine.path, table)}
    traffic = Traffic(
        commit_bytes=len(copied) * SECTOR if target else 0,
        commit_zero_bytes=len(dirty - copied) * SECTOR if target else 0,
        pull_bytes=len(done.data) * SECTOR,
        pull_read_bytes=done.read * SECTOR,
        extents=runs(dirty) + runs(as_data),
        new_clusters=len(clusters),
        new_tables=len(tables),
    )
    return traffic, between * SECTOR


def runs(cells: set[int]) -> int:
    return sum(cell - 1 not in cells for cell in cells)


def assert_counts(built: Chain, low: int, high: int) -> list[Traffic]:
    """Every target of the group low..high (base first), with what is below as new backing."""
    longest = max(built.sizes[low : high + 1]) // SECTOR
    cells = [
        cells_of(built.paths[i], built.specs[i], built.sizes[i], longest)
        for i in range(high, -1, -1)
    ]
    layers, under = cells[: high - low + 1], cells[high - low + 1 :]
    points = shadow_points(built.specs)
    new = points[low - 1] if low else None
    with open_chain(built.paths[high], fmt=built.formats[high]) as chain:
        group, below = chain.layers[: len(layers)], chain.layers[len(layers) :]
        found = count_traffic(group, range(len(group)), below)
        exact = count_traffic(group, range(len(group)), below, exact=True)
        alone = count_traffic(group, [len(group) - 1], below)
    assert alone == found[-1:]
    for target, (counted, most) in enumerate(zip(exact, found, strict=True)):
        says, between = model(layers, under, target, points[high], new)
        # A run is counted again where it crosses from one window into the next, and two are one
        # where they lie in one cell.
        assert counted.extents <= says.extents + 8, (target, counted, says)
        assert bool(counted.extents) == bool(says.extents)
        counted.extents = says.extents
        assert counted == says, target
        # By the maps alone, never less and no more than lies between.
        assert (most.commit_bytes, most.commit_zero_bytes) == (
            says.commit_bytes, says.commit_zero_bytes,
        )  # fmt: skip
        for name in ("pull_bytes", "pull_read_bytes", "new_clusters", "new_tables"):
            assert getattr(most, name) >= getattr(says, name), (target, name)
        assert most.pull_bytes <= between
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
    "zeroes behind the old backing, data in the new one": [
        "[size=6M] 4M:- 1M:A",
        "[size=3M] 64k:- 64k:B 128k:0",
        "[cluster=512 size=6M] 1k:C",
    ],
    "a commit takes on 16M at once": [
        "[cluster=2M size=60M]",
        "[size=60M] 1M:- 64k:B 960k:A 40M:0 64k:A 1984k:- 4M:0",
    ],
    "zeroes end within a cluster, in another window": [
        "[cluster=1M size=31521k]",
        "384k:0 22M:+ 640k:0 4M:- 3873k:0",
    ],
    "an L2 table ends within zeroes": ["[cluster=1M size=8M]", "[cluster=4k size=8M] 512k:- 5M:0"],
    "subclusters of a cluster that has a place, and of one that has none": [
        "[size=128k] 128k:A",
        "[size=256k] 256k:C",
        "[ext size=256k] 64k:d 4k:D 188k:-",
    ],
    "small clusters under a large one": [
        "[size=1M] 1M:A",
        "[cluster=4k] 8k:- 4k:B 12k:- 8k:C | 20k:- 4k:A",
        "[size=3M cluster=2M]",
    ],
    "a short layer ends within a cluster": [
        "[size=4M] 4M:A",
        "[cluster=4k size=2560] 512:A",
        "[cluster=2M size=4M]",
    ],
    "the new backing ends within a piece": [
        "[size=1000k] 1000k:A",
        "[size=3M cluster=4k] 3M:B",
        "[cluster=2M size=3M]",
    ],
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
