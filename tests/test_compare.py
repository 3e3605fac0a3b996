"""Comparing points: against the shadow model, and what may not be read is not read."""

from __future__ import annotations

import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fixtures.build import build_chain, build_tree
from fixtures.generate import chains, layer_specs
from fixtures.language import LayerLike, LayerSpec, resolve_sizes
from fixtures.oracle import qemu_compare, qemu_img, qemu_io, qemu_map, raw_of
from fixtures.shadow import shadow_points, shadow_tree
from qchain.chain.chain import open_chain
from qchain.chain.parallel import workers
from qchain.errors import DataError, Unsupported
from qchain.hostfile import HostFile
from qchain.verify.compare import Comparison, compare

SLOW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def unequal(a: bytes, b: bytes) -> npt.NDArray[np.bool_]:
    """Byte by byte, the shorter one zero beyond its end."""
    size = max(len(a), len(b))
    x, y = (np.frombuffer(side.ljust(size, b"\0"), np.uint8) for side in (a, b))
    out: npt.NDArray[np.bool_] = x != y
    return out


def differing_ranges(where: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for sector in np.flatnonzero(where.reshape(-1, 512).any(axis=1)).tolist():
        if out and sum(out[-1]) == sector * 512:
            out[-1] = (out[-1][0], out[-1][1] + 512)
        else:
            out.append((sector * 512, 512))
    return out


def assert_outcome(found: Comparison, a: bytes, b: bytes) -> None:
    where = unequal(a, b)
    assert found.identical == (not where.any())
    assert found.first_difference == (int(where.argmax()) if where.any() else None)
    assert found.different_bytes == int(np.count_nonzero(where))
    assert found.ranges == differing_ranges(where)
    assert found.compared_bytes + found.skipped_bytes == max(len(a), len(b))


def places(path: Path, fmt: str, chain: Sequence[Path], sectors: int) -> list[object]:
    """Per guest sector: which place in which file it is, by qemu's map; None where it is zero."""
    out: list[object] = [None] * sectors
    for extent in qemu_map(path, fmt):
        if extent["data"]:
            for index in range(extent["length"] // 512):
                sector = extent["start"] // 512 + index
                # A compressed cluster has no offset: only one guest range of a file leads to it.
                offset = extent["offset"] + index * 512 if "offset" in extent else f"at {sector}"
                out[sector] = (chain[extent["depth"]].resolve(), offset)
    return out


Pair = tuple[Path, str, list[Path]]
"""A point: its image, the format, and the files of its chain, active first."""


def stays_put(specs: Iterable[LayerSpec]) -> bool:
    """Whether the holes of the raw files are the same at every look.

    A zero write into a raw file allocates without writing: to SEEK_DATA that is a hole
    until somebody reads it, and data while the page cache holds it.
    """
    raw = [spec for spec in specs if spec.format == "raw"]
    return not any(run.kind == "0" for spec in raw for one in spec.passes for run in one)


def assert_compares(
    a: Pair, b: Pair, point_a: bytes, point_b: bytes, exact: bool = True
) -> Comparison:
    """Both ways round, with and without skipping; `exact`: what may be skipped is skipped."""
    sectors = max(len(point_a), len(point_b)) // 512
    at_a, at_b = places(*a, sectors), places(*b, sectors)
    zero = sum(x is None and y is None for x, y in zip(at_a, at_b, strict=True)) * 512
    same = sum(x is not None and x == y for x, y in zip(at_a, at_b, strict=True)) * 512
    with open_chain(a[0], fmt=a[1]) as left, open_chain(b[0], fmt=b[1]) as right:
        found = compare(left.layers, right.layers)
        assert_outcome(found, point_a, point_b)
        turned = compare(right.layers, left.layers)
        assert_outcome(turned, point_a, point_b)
        all_read = compare(left.layers, right.layers, everything=True)
        assert_outcome(all_read, point_a, point_b)
        if exact:
            assert found.skipped_bytes == turned.skipped_bytes == zero + same
            assert all_read.skipped_bytes == zero
        early = compare(left.layers, right.layers, stop_early=True)
        assert early.first_difference == found.first_difference
    return found


def both_ways(paths: Sequence[Path], formats: Sequence[str], top: int) -> Pair:
    return paths[top], formats[top], list(reversed(paths[: top + 1]))


@SLOW
@given(specs=chains(), data=st.data())
def test_points_of_one_chain(specs: list[LayerSpec], data: st.DataObject) -> None:
    low = data.draw(st.integers(0, len(specs) - 1))
    high = data.draw(st.integers(0, len(specs) - 1))
    with tempfile.TemporaryDirectory() as directory:
        built = build_chain(Path(directory), specs)
        points = shadow_points(specs)
        a, b = (
            both_ways(built.paths, built.formats, low),
            both_ways(built.paths, built.formats, high),
        )
        found = assert_compares(a, b, points[low], points[high], stays_put(specs))
        event(f"identical: {found.identical}")
        assert found.identical or low != high


@SLOW
@given(base=chains(min_layers=1, max_layers=2), data=st.data())
def test_two_overlays_of_a_base(base: list[LayerSpec], data: st.DataObject) -> None:
    size = resolve_sizes(base)[-1]
    tree: dict[str, tuple[str | None, LayerLike]] = {"base": (None, base[0])}
    if len(base) == 2:
        tree["middle"] = ("base", base[1])
    root = list(tree)[-1]
    for name in ("one", "two"):
        tree[name] = (root, data.draw(layer_specs(size)))
    with tempfile.TemporaryDirectory() as directory:
        built = build_tree(Path(directory), tree)
        points = shadow_tree(tree)
        below = [built.paths[name] for name in reversed(list(tree)[:-2])]
        one, two = ((built.paths[n], "qcow2", [built.paths[n], *below]) for n in ("one", "two"))
        assert_compares(one, two, points["one"], points["two"], stays_put(base))


@SLOW
@given(specs=chains(max_layers=3), other=chains(max_layers=2))
def test_unrelated_chains(specs: list[LayerSpec], other: list[LayerSpec]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        pairs = []
        for name, layers in (("a", specs), ("b", other)):
            built = build_chain(Path(directory) / name, layers)
            pairs.append(both_ways(built.paths, built.formats, len(layers) - 1))
        point_a, point_b = shadow_points(specs)[-1], shadow_points(other)[-1]
        exact = stays_put([*specs, *other])
        found = assert_compares(pairs[0], pairs[1], point_a, point_b, exact)
        assert qemu_compare(pairs[0][0], pairs[1][0]) == found.identical


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(specs=chains(), data=st.data())
def test_one_changed_byte_is_found(specs: list[LayerSpec], data: st.DataObject) -> None:
    """A flat copy is identical; with a single byte changed anywhere, just that one differs."""
    with tempfile.TemporaryDirectory() as directory:
        built = build_chain(Path(directory), specs)
        point = shadow_points(specs)[-1]
        flat = Path(directory) / "flat.raw"
        flat.write_bytes(point)
        with open_chain(built.active) as chain, open_chain(flat, fmt="raw") as copy:
            assert compare(chain.layers, copy.layers).identical
        at = data.draw(st.integers(0, len(point) - 1))
        with flat.open("r+b") as file:
            file.seek(at)
            file.write(bytes([point[at] ^ 1 << data.draw(st.integers(0, 7))]))
        with open_chain(built.active) as chain, open_chain(flat, fmt="raw") as copy:
            found = compare(chain.layers, copy.layers)
        assert (found.first_difference, found.different_bytes) == (at, 1)
        assert found.ranges == [(at // 512 * 512, 512)]


def test_large_data_in_many_batches(tmp_path: Path) -> None:
    """More than a batch and a window; differences at the edges of both, and joined across."""
    size = 40 << 20
    a = build_chain(tmp_path / "a", [f"[cluster=4k size={size}] 37M:A 512:B"])
    flat = tmp_path / "flat.raw"
    content = bytearray(raw_of(a.active))
    edges = [
        0,
        (4 << 20) - 1,
        4 << 20,
        (8 << 20) + 511,
        (8 << 20) + 512,
        (37 << 20) + 511,
        size - 1,
    ]
    for at in edges:
        content[at] ^= 0xFF
    content[(11 << 20) : (21 << 20)] = bytes(10 << 20)
    flat.write_bytes(content)
    seen: list[tuple[int, int]] = []
    with open_chain(a.active) as left, open_chain(flat, fmt="raw") as right:
        found = compare(left.layers, right.layers, progress=lambda *at: seen.append(at))
        early = compare(left.layers, right.layers, stop_early=True)
    assert_outcome(found, raw_of(a.active), bytes(content))
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)
    assert early.first_difference == 0


def test_stopping_early_stops_reading(tmp_path: Path) -> None:
    """Within one window too: of 64K clusters it is 8 GiB long."""
    flat = tmp_path / "flat.raw"
    flat.write_bytes(b"y" + b"x" * ((128 << 20) - 1))
    built = build_chain(tmp_path, ["[size=128M]"])
    with open_chain(built.active) as left, open_chain(flat, fmt="raw") as right:
        found = compare(left.layers, right.layers, stop_early=True)
    assert found.first_difference == 0
    assert found.compared_bytes <= 100 << 20


@pytest.mark.parametrize("tail", ["hole", "zeroes", "data"])
def test_different_sizes(tail: str, tmp_path: Path) -> None:
    """The longer one must be zero beyond the end of the shorter one."""
    kind = {"hole": "-", "zeroes": ".", "data": "B"}[tail]
    built = build_tree(
        tmp_path,
        {
            "base": (None, "[cluster=4k] 10k:A 512:C"),
            "long": ("base", f"[cluster=64k size=3M] 2M:- 512:{kind}"),
            "other": (None, "[cluster=512] 10k:A 512:C"),
        },
    )
    paths = built.paths
    with open_chain(paths["base"]) as short, open_chain(paths["long"]) as long:
        for found in (compare(short.layers, long.layers), compare(long.layers, short.layers)):
            assert found.identical == (tail != "data") == qemu_compare(paths["base"], paths["long"])
            assert found.first_difference == (2 << 20 if tail == "data" else None)
            assert found.compared_bytes + found.skipped_bytes == 3 << 20
        with open_chain(paths["other"]) as other:
            assert compare(long.layers, other.layers).identical == (tail != "data")


def test_an_empty_disk(tmp_path: Path) -> None:
    built = build_tree(tmp_path, {"a": (None, "[size=0]"), "b": (None, "[size=64k] 512:A"),
                                  "c": (None, "[size=64k]")})  # fmt: skip
    a, b, c = (built.paths[name] for name in "abc")
    with open_chain(a) as empty, open_chain(b) as data, open_chain(c) as zero:
        assert compare(empty.layers, empty.layers) == Comparison()
        assert compare(empty.layers, data.layers).first_difference == 0
        assert compare(zero.layers, empty.layers) == Comparison(skipped_bytes=65536)


def test_a_hole_in_a_raw_file_is_not_read(tmp_path: Path) -> None:
    """A terabyte of nothing on both sides takes no time."""
    flat = tmp_path / "flat.raw"
    with flat.open("wb") as file:
        file.write(b"x" * 65536)
        file.truncate(1 << 40)
    built = build_chain(tmp_path, ["[size=1024G cluster=2M] 64k:A"])
    qemu_io(built.active, ["write -q -P 120 0 64k"], "qcow2")
    with open_chain(built.active) as left, open_chain(flat, fmt="raw") as right:
        found = compare(left.layers, right.layers)
    assert found.identical
    assert found.compared_bytes <= 4 << 20
    assert found.compared_bytes + found.skipped_bytes == 1 << 40


def data_reads(
    monkeypatch: pytest.MonkeyPatch, images: Sequence[tuple[Path, str]]
) -> Counter[object]:
    """Count, from here on, how often each 512-byte place that holds guest data is read."""
    data: set[object] = set()
    inodes: dict[Path, int] = {path: path.stat().st_ino for path, _ in images}
    for path, fmt in images:
        for extent in qemu_map(path, fmt):
            if extent["depth"] == 0 and extent["data"] and "offset" in extent:
                first = extent["offset"] // 512
                data |= {(inodes[path], first + i) for i in range(extent["length"] // 512)}
    counts: Counter[object] = Counter()
    plain = HostFile.pread_into

    def counting(self: HostFile, buffer: memoryview, offset: int) -> int:
        for place in range(offset // 512, -(-(offset + len(buffer)) // 512)):
            if (self.id.inode, place) in data:
                counts[self.id.inode, place] += 1
        return plain(self, buffer, offset)

    monkeypatch.setattr(HostFile, "pread_into", counting)
    return counts


TREE: dict[str, tuple[str | None, LayerLike]] = {
    "raw": (None, "[raw] 1M:A 64k:- 200k:B"),
    "base": ("raw", "[cluster=4k] 100k:- 300k:C 4k:0 100k:D"),
    "one": ("base", "[cluster=64k] 90k:- 64k:E 500k:- 70k:F"),
    "two": ("base", "[ext] 128k:- 2k:G 2k:0 700k:- 3k:H"),
}


def test_no_place_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_tree(tmp_path, TREE)
    points = shadow_tree(TREE)
    images = [(path, built.specs[name].format) for name, path in built.paths.items()]
    counts = data_reads(monkeypatch, images)
    with open_chain(built.paths["one"]) as one, open_chain(built.paths["two"]) as two:
        found = compare(one.layers, two.layers)
        assert_outcome(found, points["one"], points["two"])
        assert set(counts.values()) == {1}
        assert sum(counts.values()) * 512 <= 2 * found.compared_bytes
        skipping = sum(counts.values())
        # The same file through another object, and a point against itself: nothing is read.
        counts.clear()
        with open_chain(built.paths["one"]) as again:
            found = compare(one.layers, again.layers)
        assert found.identical
        assert (found.compared_bytes, found.skipped_bytes) == (0, len(points["one"]))
        assert not counts
        # Told to read everything, it does: both sides.
        compare(one.layers, two.layers, everything=True)
        assert sum(counts.values()) > 2 * skipping
        counts.clear()
        found = compare(one.layers, one.layers, everything=True)
        assert found.identical
        assert set(counts.values()) == {2}


def test_everything_does_not_believe_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero by the map is proven by the map alone; the same place is really read again."""
    built = build_chain(tmp_path, ["64k:A 64k:B", "64k:-"])
    counts = data_reads(monkeypatch, [(built.base, "qcow2"), (built.active, "qcow2")])
    with open_chain(built.base) as base, open_chain(built.active) as active:
        assert compare(base.layers, active.layers).compared_bytes == 0
        assert not counts
        found = compare(base.layers, active.layers, everything=True)
    assert (found.compared_bytes, found.skipped_bytes) == (131072, 0)
    assert sum(counts.values()) == 2 * 131072 // 512


def test_same_file_by_another_name(tmp_path: Path) -> None:
    """A hard link or a symbolic link to the base is the base."""
    built = build_chain(tmp_path, ["64k:A", "[cluster=4k] 4k:B"])
    (tmp_path / "link").symlink_to(built.base.name)
    (tmp_path / "twin").hardlink_to(built.base)
    for name in ("link", "twin"):
        with open_chain(built.active) as chain, open_chain(tmp_path / name) as other:
            found = compare(chain.layers, other.layers)
        assert (found.different_bytes, found.compared_bytes) == (4096 - count_same(), 4096)


def count_same() -> int:
    """Of the first 4096 bytes, those that patterns A and B have in common."""
    a, b = shadow_points(["4k:A"])[0], shadow_points(["4k:B"])[0]
    return len(a) - int(np.count_nonzero(unequal(a, b)))


def test_one_stream_over_and_over_needs_no_memory(tmp_path: Path) -> None:
    """Every cluster of a table leads to one compressed stream: a run of 512 MiB."""
    built = build_chain(tmp_path / "a", ["[size=512M] 64k:a"])
    raw = bytearray(built.base.read_bytes())
    l1 = int.from_bytes(raw[40:48], "big")
    table = int.from_bytes(raw[l1 : l1 + 8], "big") & (1 << 56) - 512
    assert raw[table] & 0x40, "compressed"
    raw[table : table + 65536] = raw[table : table + 8] * 8192
    built.base.write_bytes(raw)
    copy = tmp_path / "copy"
    copy.write_bytes(raw)
    tracemalloc.start()
    try:
        with open_chain(built.base) as left, open_chain(copy) as right:
            found = compare(left.layers, right.layers)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.identical
    assert found.compared_bytes == 512 << 20
    assert peak < (16 + 12 * workers()) << 20


def test_damage_is_an_error_not_a_difference(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["64k:a 64k:b", "[cluster=4k] 128k:-"])
    other = build_chain(tmp_path / "other", ["64k:A 64k:B"])
    raw = built.base.read_bytes()
    with built.base.open("r+b") as file:
        file.seek(len(raw) // 65536 * 65536)
        file.write(b"\xff" * (len(raw) % 65536 or 65536))
    with open_chain(built.active) as left, open_chain(other.active) as right:
        with pytest.raises(DataError):
            compare(left.layers, right.layers)
        # Both resolve to the same place: the damage is the same on both sides.
        assert compare(left.layers, left.layers).identical
        with pytest.raises(DataError):
            compare(left.layers, left.layers, everything=True)


def test_encrypted_images_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "luks.qcow2"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu_img(
        "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o", options, path, "1M"
    )
    built = build_chain(tmp_path, ["64k:A"])
    with (
        open_chain(path) as locked,
        open_chain(built.active) as plain,
        pytest.raises(Unsupported, match="encrypted"),
    ):
        compare(plain.layers, locked.layers)
