"""The fixtures themselves: what they build is what they say, by qemu's word."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from fixtures import ext4
from fixtures.bigmeta import build_big_chain, write_metadata_image
from fixtures.build import Chain, build_chain, build_tree
from fixtures.generate import chains
from fixtures.language import LayerSpec, Run, format_layer, parse_layer, resolve_sizes
from fixtures.oracle import (
    QemuError,
    qemu_check,
    qemu_compare,
    qemu_img,
    qemu_info,
    qemu_io,
    qemu_map,
    raw_of,
)
from fixtures.shadow import pattern, shadow_points, shadow_tree

EXAMPLES = {
    "plain": ["64k:A 64k:B 64k:-", "32k:- 64k:C"],
    "all kinds": ["64k:A 64k:b 64k:0 64k:+ 64k:. 64k:~ 64k:-", "[cluster=4k] 4k:0 4k:+ 4k:. 4k:~"],
    "raw base": ["[raw] 64k:A 1k:0 1k:~ 512:+ 512:. 64k:-", "2k:- 512:B"],
    "raw discard": ["[raw] 64k:A | 1536:- 1k:~ 512:- 1k:+"],
    "v3 discard hides": ["256k:A", "[cluster=64k] 10k:- 100k:~ 64k:-"],
    "v2 discard does nothing": ["256k:A", "[v2] 128k:B | 192k:~"],
    "v2 discard of a base": ["[v2] 256k:A | 10k:- 200k:~"],
    "v2 zero writes": ["[cluster=4k] 64k:A", "[v2 cluster=4k] 4k:0 1k:+ 8k:0 4k:~ 4k:."],
    "discard to an odd end": ["[cluster=4k] 5k:A", "[cluster=4k] 4k:- 1k:~"],
    "short below": ["256k:A", "[size=64k] 16k:B", "[size=256k] 32k:- 1k:C"],
    "long above": ["[cluster=4k] 9k:A", "[size=1M] 512k:- 64k:B"],
    "extended": ["256k:A", "[ext zstd] 64k:a 2k:B 2k:0 2k:~ 58k:- | 128k:- 64k:~"],
    "extended zeroes": ["256k:A", "[ext cluster=16k] 16k:B 16k:- | 512:0 7k:0 10k:+"],
    "compressed": ["[zstd cluster=4k] 64k:a 1k:b", "[cluster=512] 5k:c 512:0"],
    "preallocated": ["[prealloc=metadata] 64k:A 64k:-", "[ext prealloc=metadata] 64k:-"],
    "zero over data": ["[cluster=4k] 64k:A", "[cluster=4k] 64k:B | 8k:0 8k:+ 8k:~ 8k:."],
    "odd refcounts": ["[refcount=1] 64k:A", "[refcount=64 lazy] 1k:B"],
    "data file": ["[datafile] 64k:A 64k:0 | 64k:~"],
    "large clusters": ["[cluster=2M] 1M:A 2M:- 1M:B", "[cluster=512 v2] 512:C 1M:- 1k:D"],
    "empty disk": ["[size=0]", "[size=64k] 512:A"],
}


def assert_as_shadowed(chain: Chain) -> None:
    points = shadow_points(chain.specs)
    for path, fmt, size, point in zip(chain.paths, chain.formats, chain.sizes, points, strict=True):
        assert len(point) == size
        assert raw_of(path, fmt) == point, path.name
        if fmt == "qcow2":
            assert qemu_info(path)["virtual-size"] == size
            assert qemu_check(path) == {"corruptions": 0, "leaks": 0}, path.name


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_reads_as_its_shadow(name: str, tmp_path: Path) -> None:
    assert_as_shadowed(build_chain(tmp_path, EXAMPLES[name]))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(specs=chains())
def test_random_chain_reads_as_its_shadow(specs: list[LayerSpec]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        assert_as_shadowed(build_chain(Path(directory), specs))


@settings(max_examples=200, deadline=None)
@given(specs=chains())
def test_language_round_trip(specs: list[LayerSpec]) -> None:
    for spec in specs:
        assert parse_layer(format_layer(spec)) == spec


@settings(max_examples=50, deadline=None)
@given(specs=chains(min_layers=3, max_layers=3, same_size=True))
def test_same_size_chains(specs: list[LayerSpec]) -> None:
    assert len(set(resolve_sizes(specs))) == 1


def test_parse_layer() -> None:
    spec = parse_layer("[ext cluster=64k zstd size=1M prealloc=metadata] 64k:A 512:- | 1M:0")
    assert spec == LayerSpec(
        passes=((Run(65536, "A"), Run(512, "-")), (Run(1 << 20, "0"),)),
        extended_l2=True,
        compression="zstd",
        size=1 << 20,
        preallocation="metadata",
    )
    assert spec.runs == spec.passes[0]
    assert parse_layer("[raw] 64k:A").format == "raw"
    assert parse_layer("[cluster=4k v2]").version == 2
    assert parse_layer("").runs == ()
    assert format_layer(parse_layer(" [v2  cluster=4096]   1024:A  ")) == "[cluster=4k v2] 1k:A"


@pytest.mark.parametrize(
    "line",
    [
        "64k",
        "64k:AB",
        "64k:1",
        "64q:A",
        "100:A",
        "0:A",
        "-1k:A",
        "64k:A [v2]",
        "[v2 64k:A",
        "[v2][raw] 64k:A",
        "[nonsense] 64k:A",
        "[cluster=3k] 64k:A",
        "[cluster=4M] 64k:A",
        "[v2 v3] 64k:A",
        "[v2 zstd] 64k:A",
        "[v2 ext] 64k:A",
        "[v2 refcount=1]",
        "[refcount=3]",
        "[ext cluster=4k] 64k:A",
        "[raw cluster=4k] 64k:A",
        "[raw v2] 64k:A",
        "[raw] 64k:a",
        "[prealloc=metadata] 64k:a",
        "[raw prealloc=metadata] 64k:A",
        "[size=100] ",
    ],
)
def test_bad_line(line: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_layer(line)


@pytest.mark.parametrize(
    "lines",
    [
        ["64k:A", "128k:B"],
        ["[size=32k] 64k:A"],
        ["64k:A", "[raw] 64k:A"],
        ["64k:A", "[prealloc=metadata]"],
        ["128k:A", "1k:- 64k:a"],
        ["128k:A", "63k:a"],
    ],
)
def test_impossible_chain(lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        resolve_sizes(lines)
    with pytest.raises(ValueError, match=r"\w"):
        build_chain(tmp_path, lines)
    with pytest.raises(ValueError, match=r"\w"):
        shadow_points(lines)


def test_kinds_make_the_clusters_they_name(tmp_path: Path) -> None:
    # Kinds that qemu-img map would join are kept apart by the backing file's own data.
    lines = ["512k:A", "64k:B 64k:c 64k:0 64k:- 64k:~ 64k:. 64k:- 64k:D | 448k:- 64k:0"]
    chain = build_chain(tmp_path, lines)
    found = {e["start"] >> 16: e for e in qemu_map(chain.active)}
    assert all(e["length"] == 65536 for e in found.values()), found
    state = {i: (e["depth"], e["data"], e["zero"], "offset" in e) for i, e in sorted(found.items())}
    assert state == {
        0: (0, True, False, True),
        1: (0, True, False, False),
        2: (0, False, True, False),
        3: (1, True, False, True),
        4: (0, False, True, False),
        5: (0, True, False, True),
        6: (1, True, False, True),
        7: (0, False, True, True),
    }


def test_patterns_are_unique_per_letter_and_sector() -> None:
    sectors = [
        pattern(letter, offset, 512) for letter in "ABZ" for offset in range(0, 1 << 20, 512)
    ]
    assert len(set(sectors)) == len(sectors)
    assert {len(s) for s in sectors} == {512}
    assert pattern("A", 1024, 1024) == pattern("A", 1024, 512) + pattern("A", 1536, 512)


def test_backing_names(tmp_path: Path) -> None:
    relative = build_chain(tmp_path / "r", ["[raw] 64k:A", "", ""])
    assert [p.name for p in relative.paths] == ["base.raw", "l1.qcow2", "l2.qcow2"]
    info = qemu_info(relative.paths[1])
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base.raw", "raw")
    absolute = build_chain(
        tmp_path / "a", ["64k:A", "64k:B"], names=["v", "v.1"], backing_names="absolute"
    )
    assert [p.name for p in absolute.paths] == ["v.qcow2", "v.1"]
    assert qemu_info(absolute.active)["backing-filename"] == str(absolute.base)


def test_tree(tmp_path: Path) -> None:
    plan: dict[str, tuple[str | None, str | LayerSpec]] = {
        "root": (None, "128k:A"),
        "left": ("root", "64k:B"),
        "right": ("root", "[v2] 64k:- 64k:C"),
        "leaf": ("right", "1k:D"),
    }
    tree = build_tree(tmp_path, plan)
    points = shadow_tree(plan)
    for name, path in tree.paths.items():
        assert raw_of(path) == points[name], name
    assert qemu_info(tree.paths["leaf"])["backing-filename"] == "right.qcow2"
    with pytest.raises(ValueError, match="parent"):
        build_tree(tmp_path / "x", {"a": ("b", "64k:A"), "b": (None, "64k:A")})


def test_oracle_tells_difference_and_damage(tmp_path: Path) -> None:
    chain = build_chain(tmp_path, ["64k:A", "", "512:B"])
    assert qemu_compare(chain.paths[0], chain.paths[1])
    assert not qemu_compare(chain.paths[0], chain.paths[2])
    with pytest.raises(QemuError):
        qemu_io(chain.active, ["nonsense 0 512"], "qcow2")
    with pytest.raises(QemuError):
        qemu_io(chain.active, ["write -q 1M 512"], "qcow2")
    with pytest.raises(QemuError):
        raw_of(tmp_path / "missing")
    base = bytearray(chain.base.read_bytes())
    base[2 * 65536 : 2 * 65536 + 2] = b"\0\0"  # refcount of the header cluster
    chain.base.write_bytes(base)
    assert qemu_check(chain.base)["corruptions"] == 1


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("run_length", [1, 5])
def test_metadata_image(cluster_size: int, run_length: int, tmp_path: Path) -> None:
    size = 3001 * cluster_size + 512
    path = tmp_path / "m.qcow2"
    made = write_metadata_image(path, size, cluster_size, 0.3, 7, run_length=run_length)
    assert qemu_check(path) == {"corruptions": 0, "leaks": 0}
    info = qemu_info(path)
    assert (info["virtual-size"], info["cluster-size"]) == (size, cluster_size)
    allocated = sum(e["length"] for e in qemu_map(path) if e["present"])
    assert -(-allocated // cluster_size) == made.allocated_clusters
    assert 0.2 < made.allocated_clusters / 3002 < 0.4
    again = write_metadata_image(
        tmp_path / "n.qcow2", size, cluster_size, 0.3, 7, run_length=run_length
    )
    assert again.path.read_bytes() == path.read_bytes()


def test_metadata_image_leaves_holes_in_l1(tmp_path: Path) -> None:
    size = 1 << 30
    path = tmp_path / "m.qcow2"
    made = write_metadata_image(path, size, 4096, 0.0005, 3, order="random")
    assert 0 < made.l2_tables < size // 4096 // 512
    assert qemu_check(path) == {"corruptions": 0, "leaks": 0}
    present = [e for e in qemu_map(path) if e["present"]]
    assert sum(e["length"] for e in present) == made.allocated_bytes
    hosts = [e["offset"] for e in present]
    assert hosts != sorted(hosts)


def test_big_chain(tmp_path: Path) -> None:
    images = build_big_chain(tmp_path, 64 << 20, 4096, fills=(0.3, 0.1, 0.05), seed=5)
    top = images[-1].path
    assert {e["depth"] for e in qemu_map(top) if e["present"]} == {0, 1, 2}
    owned = sum(e["length"] for e in qemu_map(top) if e["present"] and e["depth"] == 0)
    assert owned == images[-1].allocated_bytes
    for image in images:
        assert qemu_check(image.path) == {"corruptions": 0, "leaks": 0}


def test_ext4_chain(tmp_path: Path) -> None:
    chain = ext4.build_ext4_chain(tmp_path)
    assert [p.name for p in chain.paths] == ["base.qcow2", "mon.qcow2", "tue.qcow2", "wed.qcow2"]
    assert qemu_info(chain.paths[2])["backing-filename"] == "mon.qcow2"
    raw = tmp_path / "raw"
    for path, files in zip(chain.paths, chain.files, strict=True):
        assert qemu_check(path) == {"corruptions": 0, "leaks": 0}
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        assert ext4.read_files(raw) == files, path.name
        assert ext4.fsck(raw), path.name
    assert len({tuple(sorted(files.items())) for files in chain.files}) == 4
    # A pull moves what is not shadowed above, a commit all that the upper one has.
    mon, tue, wed = (_allocated(path) for path in chain.paths[1:])
    assert 3 << 4 <= len(mon - tue) < len(tue) / 4
    assert 0 < len(wed) < len(tue - wed) / 4


def _allocated(path: Path) -> set[int]:
    """Indices of the 64K clusters that the image itself allocates."""
    return {
        index
        for e in qemu_map(path)
        if e["present"] and e["depth"] == 0
        for index in range(e["start"] >> 16, (e["start"] + e["length"]) >> 16)
    }
