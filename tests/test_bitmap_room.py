"""What bitmaps take of a target: predicted, then merged, and counted in its refcounts."""

from __future__ import annotations

from pathlib import Path

import pytest
from merging import Disk
from test_space import Watch

from fixtures.oracle import qemu_img, qemu_io, raw_of
from fixtures.refcounts import usage
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Request

M = 1 << 20
SIZE = 64 * M
NAMES = ("base", "mon", "tue", "wed")
DROP = ("mon.qcow2", "tue.qcow2")
# Per layer: its clusters; for each bitmap its granularity and what is written while it records.
Layers = dict[str, tuple[str, dict[str, tuple[int, list[tuple[int, int]]]]]]
SPREAD = [(at * 4 * M, 4096) for at in range(16)]
CHAINS: dict[str, Layers] = {
    # A cluster of bits tells 2 MiB: many of them, and some without a bit.
    "512-byte clusters": {
        "base": ("512", {"b": (512, [(0, 4096)])}),
        "mon": ("512", {"b": (512, SPREAD), "c": (512, [])}),
        "tue": ("512", {"b": (512, [(3 * M, 2 * M)])}),
        "wed": ("512", {"b": (512, [(2 * M, 512), (60 * M, 512)])}),
    },
    "granularities differ": {
        "base": ("64k", {"b": (65536, [(0, M)])}),
        "mon": ("4k", {"b": (4096, [(5 * M, M)]), "old": (1024, SPREAD)}),
        "tue": ("512", {"b": (1 << 20, [(40 * M, 512)])}),
        "wed": ("1k", {"b": (512, [(63 * M, 512)])}),
    },
    "one unit is longer than a cluster tells": {
        "base": ("64k", {"b": (65536, [])}),
        "mon": ("512", {"b": (16 * M, [(20 * M, 512)])}),
        "tue": ("512", {"b": (512, [])}),
        "wed": ("512", {"b": (512, [])}),
    },
    "ordinary": {
        "base": ("64k", {"b": (65536, [(0, 8 * M)])}),
        "mon": ("64k", {"b": (65536, [(M, 4 * M)])}),
        "tue": ("64k", {"b": (65536, [(3 * M, M)]), "x": (65536, [])}),
        "wed": ("64k", {"b": (65536, [(9 * M, M)])}),
    },
}


def build(directory: Path, layers: Layers) -> Disk:
    """Each layer has contents of its own."""
    directory.mkdir()
    paths: list[Path] = []
    for number, name in enumerate(NAMES):
        cluster, bitmaps = layers[name]
        path = directory / f"{name}.qcow2"
        over = ["-b", paths[-1].name, "-F", "qcow2"] if paths else []
        qemu_img(
            *("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}"), *over, path, SIZE
        )
        for bitmap, (granularity, writes) in bitmaps.items():
            qemu_img("bitmap", "--add", "--enable", "-g", granularity, "--", path, bitmap)
            if writes:
                qemu_io(path, [f"write -q -P {number + 1} {s} {n}" for s, n in writes], "qcow2")
        paths.append(path)
    return Disk(directory, paths, {path.name: raw_of(path) for path in paths})


@pytest.mark.parametrize("strategy", ["pull", "commit", "both"])
@pytest.mark.parametrize("mode", ["carry", "drop"])
@pytest.mark.parametrize("name", CHAINS)
def test_clusters_and_peak(name: str, mode: str, strategy: str, tmp_path: Path) -> None:
    disk = build(tmp_path / "d", CHAINS[name])
    options = MergeOptions(strategy=strategy, bitmaps=mode)
    (group,) = disk.plan(Request(drop=DROP), options).groups
    assert group.chosen is not None and group.chosen.growth is not None
    growth = group.chosen.growth
    target = disk.paths[{"pull": 3, "both": 2, "commit": 1}[strategy]]
    before, length = usage(target), target.stat().st_size
    watch = Watch(disk.directory)
    disk.merge(DROP, options, before_step=watch)
    after = usage(disk.active)
    added = after.clusters - before.clusters
    assert growth.clusters_least <= added <= growth.clusters
    # Two of a bitmap for a while may take refcount blocks, which small clusters need often.
    assert growth.clusters - growth.clusters_least <= (1 if "512" in name or "dif" in name else 0)
    assert after.end <= growth.end
    assert disk.active.stat().st_size - length <= growth.file
    assert watch.extra <= group.chosen.peak_extra_bytes + 65536


def test_what_a_pull_marks_is_bounded(tmp_path: Path) -> None:
    """A bitmap that stays records the pull: which of its clusters that fills is not foretold."""
    layers = CHAINS["512-byte clusters"]
    bare: Layers = {name: (each[0], {}) for name, each in layers.items()}
    disk = build(tmp_path / "d", bare | {"wed": layers["wed"]})
    for start, count in [*SPREAD, (3 * M, 2 * M)]:
        qemu_io(disk.paths[2], [f"write -q -P 9 {start} {count}"], "qcow2")
    disk.points |= {path.name: raw_of(path) for path in disk.paths[2:]}
    (group,) = disk.plan(Request(drop=DROP), MergeOptions(strategy="pull")).groups
    assert group.chosen is not None and group.chosen.growth is not None
    growth = group.chosen.growth
    before = usage(disk.active)
    disk.merge(DROP, MergeOptions(strategy="pull"))
    added = usage(disk.active).clusters - before.clusters
    assert growth.clusters_least < added <= growth.clusters
    assert growth.clusters - growth.clusters_least <= 32
