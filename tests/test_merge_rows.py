"""The operations that the page on external snapshots names, as merges: rows T3, T4, T6 to T14, T17
and T18, each over a qcow2 and over a raw base, with relative and with absolute backing names.

"Commit b into a" is "drop the point a, let the file a hold b": `--drop a --names lowest`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from merging import Disk, format_of

from fixtures.build import BackingNames, build_chain
from fixtures.shadow import shadow_points
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Request

LINES = {
    "base": "256k:A 128k:B 384k:- 256k:C",
    "a": "64k:D 64k:- 64k:0 320k:- 128k:D 64k:. 256k:- 32k:D",
    "b": "32k:- 128k:E 352k:- 64k:0 64k:e 192k:~",
    "top": "16k:F 624k:- 48k:F 4k:. 300k:- 512:F",
}
SNAPSHOTS = ("base", "snap1", "snap2")
INSTANCES = ("instance02.img", "instance02-snapshot.img", "instance02-snapshot2.img")


@dataclass(frozen=True)
class Row:
    """`files`: base first. `after`: file name -> the point it shows, base first, as a chain."""

    name: str
    drop: tuple[str, ...]
    after: dict[str, str]
    strategy: str
    names: str = "kept"
    files: tuple[str, ...] = ("base", "a", "b", "top")
    target: str = ""
    options: dict[str, bool] = field(default_factory=dict)


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


LOWEST = "lowest"
ROWS = [
    Row("T3", ("snap1",), same("base", "snap2"), "pull", files=SNAPSHOTS, target="snap2"),
    Row("T4", ("base",), {"base": "snap1", "snap2": "snap2"}, "commit", LOWEST, SNAPSHOTS, "base"),
    Row("T6", ("base",), {"base": "a", **same("b", "top")}, "commit", LOWEST, target="base"),
    Row("T7", ("a",), {"base": "base", "a": "b", "top": "top"}, "commit", LOWEST, target="a"),
    Row("T8", ("base", "a"), {"base": "b", "top": "top"}, "commit", LOWEST, target="base"),
    Row("T9", ("base", "a", "b"), same("top"), "pull", target="top"),
    Row("T10", ("a", "b"), same("base", "top"), "pull", target="top"),
    Row("T11", ("b",), same("base", "a", "top"), "pull", target="top"),
    Row("T12-b", ("b",), {**same("base", "a"), "b": "top"}, "commit", LOWEST, target="b"),
    Row("T12-a", ("a", "b"), {"base": "base", "a": "top"}, "commit", LOWEST, target="a"),
    Row("T12-base", ("base", "a", "b"), {"base": "top"}, "commit", LOWEST, target="base"),
    Row("T13", ("a",), same("base", "b", "top"), "pull", target="b"),
    Row("T14-b", ("b",), same("base", "a", "top"), "commit", target="b"),
    Row("T14-a", ("a", "b"), same("base", "top"), "commit", target="a"),
    Row("T14-both", ("a", "b"), same("base", "top"), "both", target="b"),
    Row("T14-middle", ("a",), same("base", "b", "top"), "commit", target="a"),
    Row(
        "T14-base", ("base", "a", "b"), same("top"), "commit", target="base",
        options={"allow_format_change": True},
    ),
    Row(
        "T18", INSTANCES[:2], same(INSTANCES[2]), "pull", files=INSTANCES, target=INSTANCES[2],
    ),
]  # fmt: skip


def recorded(path: Path) -> tuple[str | None, str | None]:
    """Backing name and format, read from the header's bytes."""
    data = path.read_bytes()[:65536]
    if data[:4] != b"QFI\xfb":
        return None, None
    (version, offset, size) = struct.unpack_from(">IQI", data, 4)
    position, fmt = 72 if version == 2 else struct.unpack_from(">I", data, 100)[0], None
    while True:
        kind, length = struct.unpack_from(">II", data, position)
        if kind == 0:
            break
        if kind == 0xE2792ACA:
            fmt = data[position + 8 : position + 8 + length].decode()
        position += 8 + -(-length // 8) * 8
    return (data[offset : offset + size].decode() if offset else None), fmt


def made(directory: Path, row: Row, base_format: str, backing_names: BackingNames) -> Disk:
    lines = [LINES[name] for name in ("base", "a", "b", "top")][: len(row.files)]
    if base_format == "raw":
        lines[0] = f"[raw] {lines[0]}"
    chain = build_chain(directory, lines, row.files, backing_names)
    points = dict(zip(row.files, shadow_points(lines), strict=True))
    return Disk(directory, list(chain.paths), points)


@pytest.mark.parametrize("backing_names", ["relative", "absolute"])
@pytest.mark.parametrize("base_format", ["qcow2", "raw"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(tmp_path: Path, row: Row, base_format: str, backing_names: BackingNames) -> None:
    disk = made(tmp_path, row, base_format, backing_names)
    path = dict(zip(row.files, disk.paths, strict=True))
    inode = path[row.target].stat().st_ino
    plan, result = disk.merge(
        [path[name].name for name in row.drop],
        MergeOptions(strategy=row.strategy, names=row.names, **row.options),
    )
    assert result.identical
    disk.expect({path[name].name: point for name, point in row.after.items()})
    # The file that was to receive the data did: it is there under the name asked for.
    assert inode in {path[name].stat().st_ino for name in row.after}
    assert plan.groups[0].chosen is not None and plan.groups[0].chosen.strategy == row.strategy
    below: Path | None = None
    for name in row.after:
        if below is None:
            assert recorded(path[name]) == (None, None)
        else:
            expected = str(below) if backing_names == "absolute" else below.name
            assert recorded(path[name]) == (expected, format_of(below))
        below = path[name]


@pytest.mark.parametrize("base_format", ["qcow2", "raw"])
@pytest.mark.parametrize(
    ("lines", "winner"),
    [
        (["4M:A", "64k:B", "64k:- 64k:C", "2M:D"], "top"),
        (["4M:A", "64k:B", "64k:- 2M:C", "64k:D"], "b"),
        (["4M:A", "1M:- 2M:B", "64k:- 64k:C", "64k:D"], "a"),
    ],
)
def test_row_t17_the_least_data_moves(
    tmp_path: Path, lines: list[str], winner: str, base_format: str
) -> None:
    """The base stays; of the others the one that owns most is the file that stays."""
    files = ("base", "a", "b", "top")
    if base_format == "raw":
        lines = [f"[raw] {lines[0]}", *lines[1:]]
    chain = build_chain(tmp_path, lines, files)
    path = dict(zip(files, chain.paths, strict=True))
    points = dict(zip((p.name for p in chain.paths), shadow_points(lines), strict=True))
    disk = Disk(tmp_path, list(chain.paths), points)
    inode, used = path[winner].stat().st_ino, path[winner].stat().st_size
    disk.merge(request=Request(collapse=True), options=MergeOptions(prefer="writes"))
    disk.expect(same(path["base"].name, path["top"].name))
    assert path["top"].stat().st_ino == inode
    # Moving the largest layer would have added 2 MiB.
    assert path["top"].stat().st_size - used < 512 << 10
    assert recorded(path["top"]) == (path["base"].name, base_format)


@pytest.mark.parametrize("names", ["kept", "lowest", "target"])
@pytest.mark.parametrize("strategy", ["auto", "pull", "commit"])
def test_two_groups_in_one_merge(tmp_path: Path, strategy: str, names: str) -> None:
    """base and b go: a and top are kept, and top's header names what a is called then."""
    row = Row("", (), {}, "")
    disk = made(tmp_path, row, "qcow2", "relative")
    options = MergeOptions(strategy=strategy, names=names)
    plan, _ = disk.merge(["base.qcow2", "b.qcow2"], options)
    points = {name.name: disk.points[name.stem] for name in disk.paths}
    disk = Disk(tmp_path, disk.paths, points)
    after = disk.after(plan)
    assert sorted(after.values()) == ["a.qcow2", "top.qcow2"]
    disk.expect(after)
    by_point = {point: name for name, point in after.items()}
    assert recorded(tmp_path / by_point["top.qcow2"]) == (by_point["a.qcow2"], "qcow2")
    if names == "kept":
        assert by_point == same("a.qcow2", "top.qcow2")
    if names == "lowest":
        assert by_point == {"a.qcow2": "base.qcow2", "top.qcow2": "b.qcow2"}
