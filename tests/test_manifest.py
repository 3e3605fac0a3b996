"""Digests of a point, taken before a merge and held against its result.

hashlib over qemu-img's raw conversion judges the file; a qemu-img that damages what it was not
to touch shows what it is for.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from cli_runner import run
from merging import build
from stopping import killed

from fixtures.oracle import qemu_img, qemu_io, raw_of
from qchain.chain.chain import open_chain
from qchain.errors import Damaged, ImageError
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Command, Compare, Step
from qchain.run.qemu_img import QemuImg
from qchain.run.recover import journals_at, recover
from qchain.verify.manifest import check_manifest, take_manifest

K, M = 1 << 10, 1 << 20
LINES = [
    "512k:A 512k:-",
    "64k:B 64k:- 64k:B 64k:- 64k:0",
    "128k:C 64k:- 64k:C",
    "64k:D 192k:- 64k:D",
]
NAMES = ("base", "a", "b", "top")
WAYS = [
    ("pull", "kept"), ("commit", "kept"), ("both", "kept"), ("copy", "kept"),
    ("commit", "lowest"), ("both", "target"), ("pull", "lowest"), ("copy", "lowest"),
]  # fmt: skip
DROP = ("a.qcow2", "b.qcow2")


def taken(active: Path, into: Path) -> Path:
    fd = os.open(into, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        with open_chain(active) as chain:
            take_manifest(chain.layers, fd)
    finally:
        os.close(fd)
    return into


def expected(raw: bytes) -> bytes:
    """The digests as the format says, by hand."""
    out = b""
    for at in range(0, len(raw), 64 * K):
        piece = raw[at : at + 64 * K]
        out += hashlib.sha256(piece).digest() if any(piece) else bytes(32)
    return out


@pytest.mark.parametrize(
    "lines",
    [
        LINES,
        ["[size=9M] 5M:A 64k:0 1M:-", "4500k:- 4k:B"],
        ["[cluster=4k size=999936] 4k:A 8k:- 100k:B", "[cluster=512 size=700416] 512:C"],
        ["[raw size=300k] 3k:A 9k:- 100k:R"],
        ["[size=40M] 64k:-", "12M:- 64k:A 20M:- 64k:B"],
        ["[size=1M] 64k:-"],
    ],
    ids=range(6),
)
def test_the_file(tmp_path: Path, lines: list[str]) -> None:
    names = NAMES[: len(lines)]
    disk = build(tmp_path / "images", lines, names)
    raw = raw_of(disk.active, "raw" if lines[0].startswith("[raw") and len(lines) == 1 else "qcow2")
    manifest = taken(disk.active, tmp_path / "manifest")
    data = manifest.read_bytes()
    assert data[4096:] == expected(raw)
    assert json.loads(data[:4096]) == {
        "qchain_manifest": 1, "algorithm": "sha256", "unit": 64 * K, "virtual_size": len(raw),
    }  # fmt: skip
    with open_chain(disk.active) as chain:
        assert check_manifest(manifest, chain.layers).identical


@pytest.mark.parametrize("offset", [0, 4 * M - 1, 4 * M, 12 * M + 5, 33 * M, 40 * M - 1])
@pytest.mark.parametrize("byte", [0, 0x77])
def test_one_byte(tmp_path: Path, offset: int, byte: int) -> None:
    """In data and where nothing was, in blocks that only one of both has."""
    disk = build(
        tmp_path / "images", ["[size=40M] 64k:-", "12M:- 64k:A 20M:- 64k:B"], ("base", "top")
    )
    manifest = taken(disk.active, tmp_path / "manifest")
    before = raw_of(disk.active)
    qemu_io(disk.active, [f"write -q -P {byte} {offset} 1"], "qcow2")
    with open_chain(disk.active) as chain:
        found = check_manifest(manifest, chain.layers)
    if before[offset] == byte:
        assert found.identical
    else:
        start = offset // (64 * K) * 64 * K
        assert (found.first_difference, found.different_bytes) == (start, 64 * K)
        assert found.ranges == [(start, 64 * K)]


def test_what_is_no_manifest(tmp_path: Path) -> None:
    disk = build(tmp_path / "images", LINES, NAMES)
    manifest = taken(disk.active, tmp_path / "manifest")
    other = build(tmp_path / "other", ["2M:A"], ("top",))
    with open_chain(other.active) as chain, pytest.raises(ImageError, match="a disk of 1048576"):
        check_manifest(manifest, chain.layers)
    for content in (b"", b"[" * 5000, b"{}", b'{"qchain_manifest": 2}', os.urandom(9000)):
        manifest.write_bytes(content)
        with open_chain(disk.active) as chain, pytest.raises(ImageError, match="is not a manifest"):
            check_manifest(manifest, chain.layers)


@pytest.mark.parametrize(("strategy", "names"), WAYS)
def test_killed_before_every_step(tmp_path: Path, strategy: str, names: str) -> None:
    options = MergeOptions(strategy=strategy, names=names, verify="manifest")
    number, came = 0, True
    while came:
        disk = build(tmp_path / str(number), LINES, NAMES)
        with open_chain(disk.active) as chain:
            plan = make_plan(chain, Request(drop=DROP), options)
            assert not plan.refusals, plan.refusals
            came = killed(plan, chain, lambda seen, _step, at=number: seen == at)
        recover(journals_at(disk.directory))
        disk.expect(disk.after(plan))
        number += 2


def test_a_guest_writes_after_the_stop(tmp_path: Path) -> None:
    """The manifest is taken anew: it is the present content that must not be lost."""
    for when in (Compare, Command):
        disk = build(tmp_path / when.__name__, LINES, NAMES)
        options = MergeOptions(strategy="commit", verify="manifest")

        def at(_number: int, step: Step, when: type[Step] = when) -> bool:
            return isinstance(step, when)

        with open_chain(disk.active) as chain:
            plan = make_plan(chain, Request(drop=DROP), options)
            assert killed(plan, chain, at)
        qemu_io(disk.active, ["write -q -P 0x55 704k 64k"], "qcow2")
        now = bytearray(disk.points["top.qcow2"])
        now[704 * K : 768 * K] = b"\x55" * (64 * K)
        recover(journals_at(disk.directory))
        assert raw_of(disk.active) == bytes(now)
        assert {path.name for path in disk.directory.iterdir()} == {"base.qcow2", "top.qcow2"}


DAMAGE = """#!/bin/sh
qemu-img "$@" || exit $?
case $1 in commit) ;; *) exit 0 ;; esac
# A cluster of the target that the guest sees and that nothing was to be moved to.
qemu-io -c "write -q -P 0x5a 128k 4k" --image-opts \\
    driver=qcow2,file.locking=off,file.filename={target}
"""


@pytest.mark.parametrize("verify", ["moved", "manifest"])
def test_damage_to_what_was_not_moved(tmp_path: Path, verify: str) -> None:
    disk = build(tmp_path / "images", LINES, NAMES)
    program = tmp_path / "qemu-img"
    program.write_text(DAMAGE.format(target=disk.paths[1]))
    program.chmod(0o755)
    options = MergeOptions(strategy="commit", verify=verify)
    if verify == "moved":
        # Seen by nothing that looks at what was moved: that is why there is the other mode.
        disk.merge(DROP, options, qemu=QemuImg(program))
        assert raw_of(disk.active) != disk.points["top.qcow2"]
        return
    with pytest.raises(Damaged, match=r"at guest offset 131072, .* nothing was deleted"):
        disk.merge(DROP, options, qemu=QemuImg(program))
    assert {path.name for path in disk.directory.iterdir()} == set(disk.points)


@pytest.mark.parametrize(("strategy", "names"), WAYS)
def test_kept_as_evidence(tmp_path: Path, strategy: str, names: str) -> None:
    disk = build(tmp_path / "images", LINES, NAMES)
    done = run("merge", "--yes", "--drop", "a.qcow2", "--drop", "b.qcow2", "--strategy", strategy,
               "--names", names, "--verify", "manifest", "--keep-files", "--json",
               disk.active)  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["verified"] == {
        "mode": "manifest", "compared_bytes": done.json["verified"]["compared_bytes"],
        "identical": True,
    }  # fmt: skip
    (manifest,) = disk.directory.glob("*.qchain-manifest")
    assert manifest.read_bytes()[4096:] == expected(disk.points["top.qcow2"])
    assert manifest.stat().st_mode & 0o777 == 0o600
    result = manifest.with_name(manifest.name.removesuffix(".qchain-manifest"))
    assert "intact" in run("verify", "--manifest", manifest, result).out
    qemu_io(result, ["write -q -P 1 0 512"], "qcow2")
    changed = run("verify", "--manifest", manifest, result, "--json")
    assert (changed.code, changed.json["first_difference"]) == (1, 0)
    assert not [path for path in disk.directory.iterdir() if path.name.startswith(".")]


def test_verify_wants_one_of_both(tmp_path: Path) -> None:
    disk = build(tmp_path / "images", LINES, NAMES)
    run("verify", disk.active).fails(2)
    qemu_img("info", disk.active)
