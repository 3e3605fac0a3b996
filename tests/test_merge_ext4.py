"""A chain with a real filesystem: after every merge each kept point has its files.

The judge is the filesystem: qemu-img makes the point raw, e2fsck finds nothing to complain
of, and debugfs reads every file. base <- mon <- tue <- wed; tue overwrites most of mon.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.ext4 import Ext4Chain, build_ext4_chain, fsck, read_files
from fixtures.oracle import qemu_check, qemu_img
from qchain.chain.chain import open_chain
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.run.execute import execute

MERGES = [
    ("auto", "kept", ("mon", "tue")),
    ("pull", "kept", ("mon", "tue")),
    ("commit", "kept", ("mon", "tue")),
    ("both", "kept", ("mon", "tue")),
    ("auto", "lowest", ("base", "mon", "tue")),
    ("commit", "lowest", ("mon",)),
    ("pull", "kept", ("base", "tue")),
]


@pytest.fixture(scope="module")
def template() -> Iterator[Ext4Chain]:
    with tempfile.TemporaryDirectory(dir=memory()) as directory:
        yield build_ext4_chain(Path(directory), size=64 << 20)


def memory() -> Path | None:
    """Somewhere quick, where there is such a place."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


def files_of(image: Path, scratch: Path) -> dict[str, str]:
    raw = scratch / "judged.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, raw)
    try:
        assert fsck(raw), f"the filesystem in {image.name} is damaged"
        return read_files(raw)
    finally:
        raw.unlink()


@pytest.mark.parametrize(("strategy", "names", "drop"), MERGES)
def test_every_kept_point_has_its_files(
    template: Ext4Chain, strategy: str, names: str, drop: tuple[str, ...]
) -> None:
    with tempfile.TemporaryDirectory(dir=memory()) as scratch:
        directory = Path(scratch) / "images"
        shutil.copytree(template.paths[0].parent, directory)
        chain = replace(template, paths=tuple(directory / path.name for path in template.paths))
        expected = {path.stem: files for path, files in zip(chain.paths, chain.files, strict=True)}
        request = Request(drop=tuple(f"{name}.qcow2" for name in drop))
        with open_chain(chain.active) as opened:
            plan = make_plan(opened, request, MergeOptions(strategy=strategy, names=names))
            assert not plan.refusals
            result = execute(plan, opened)
        assert result.identical and result.compared_bytes > 0
        members = {index for group in plan.groups for index in group.group.members}
        found = {
            layer.path: layer.path.stem
            for index, layer in enumerate(plan.layers)
            if index not in members
        }
        for group in plan.groups:
            assert group.result is not None
            found[group.result] = plan.layers[group.group.kept].path.stem
        assert sorted(found.values()) == sorted(set(expected) - set(drop))
        assert sorted(path.name for path in directory.iterdir()) == sorted(p.name for p in found)
        for path, point in found.items():
            assert files_of(path, Path(scratch)) == expected[point], f"{path.name} is not {point}"
            assert qemu_check(path) == {"corruptions": 0, "leaks": 0}


def test_the_cheapest_way_writes_the_least(template: Ext4Chain) -> None:
    """mon and tue go: tue holds the most, so it is the file that stays, and little moves."""
    with tempfile.TemporaryDirectory(dir=memory()) as scratch:
        grown = {}
        for strategy in ("auto", "pull"):
            directory = Path(scratch) / strategy
            shutil.copytree(template.paths[0].parent, directory)
            inodes = {path.stat().st_ino: path for path in directory.iterdir()}
            before = {inode: path.stat().st_blocks * 512 for inode, path in inodes.items()}
            with open_chain(directory / template.active.name) as opened:
                request = Request(drop=("mon.qcow2", "tue.qcow2"))
                plan = make_plan(opened, request, MergeOptions(strategy=strategy))
                execute(plan, opened)
            result = plan.groups[0].result
            assert result is not None
            status = result.stat()
            grown[strategy] = status.st_blocks * 512 - before[status.st_ino]
            if strategy == "auto":
                assert inodes[status.st_ino].name == "tue.qcow2"
        assert grown["auto"] < 8 << 20 < 16 << 20 < grown["pull"], grown
