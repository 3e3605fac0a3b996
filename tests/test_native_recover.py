"""Between a native merge that was stopped and its recovery a guest runs; disks that are full."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from merging import Disk, build
from stopping import killed

from fixtures.language import parse_layer
from fixtures.oracle import qemu_check, qemu_img, qemu_io, raw_of
from qchain.chain.chain import open_chain
from qchain.errors import FailedMidway
from qchain.native.mover import Target
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Compare, NativeFree, NativeSwitch, NativeWrite, Step
from qchain.run.recover import journals_at, recover

LINES = ["512k:A", "64k:- 64k:B 64k:b 320k:-", "64k:C 128k:- 64k:0 256k:-", "32k:D 480k:-"]
ALONE = LINES[1:]
WAYS = [("pull", ALONE), ("both", LINES)]
if "QCHAIN_NATIVE_LOSSES" in os.environ:
    WAYS += [("pull", LINES), ("commit", LINES), ("commit", ALONE)]


def _stopped(disk: Disk, strategy: str, flatten: bool, number: int) -> bool:
    drop = tuple(path.name for path in disk.paths[1:-1])
    request = Request(flatten=True) if flatten else Request(drop=drop)
    with open_chain(disk.active) as chain:
        verify = "manifest" if number % 3 == 0 else "moved"
        options = MergeOptions(strategy=strategy, engine="native", verify=verify)
        plan = make_plan(chain, request, options)
        assert not plan.refusals, plan.refusals
        return killed(plan, chain, lambda seen, _: seen == number)


@pytest.mark.parametrize(("strategy", "lines"), WAYS)
def test_a_guest_wrote_meanwhile(tmp_path: Path, strategy: str, lines: list[str]) -> None:
    """Data over old data and into holes, and a discard: all of it is in the result."""
    number = 0
    while True:
        place = tmp_path / str(number)
        place.mkdir()
        disk = build(place, [parse_layer(line) for line in lines])
        if not _stopped(disk, strategy, lines is ALONE, number):
            break
        qemu_io(
            disk.active,
            ["write -q -P 7 60k 8k", "write -q -P 9 300k 4k", "discard -q 128k 64k"],
            "qcow2",
        )
        expected = raw_of(disk.active)
        recover(journals_at(place))
        assert raw_of(disk.active) == expected, number
        assert qemu_check(disk.active) == {"corruptions": 0, "leaks": 0}, number
        left = 1 if lines is ALONE else 2
        assert len(list(place.iterdir())) == left, number
        shutil.rmtree(place)
        number += 1
    assert number > 10


def test_a_guest_starts_on_the_result(tmp_path: Path) -> None:
    for strategy in ("pull", "both", "commit"):
        place = tmp_path / strategy
        place.mkdir()
        disk = build(place, [parse_layer(line) for line in LINES])
        options = MergeOptions(strategy=strategy, engine="native")
        disk.merge([path.name for path in disk.paths[1:-1]], options)
        qemu_io(
            disk.active,
            ["write -q -P 5 0 512k", "discard -q 64k 64k", "write -q -P 6 96k 4k"],
            "qcow2",
        )
        after = bytearray(b"\5" * (512 << 10))
        after[64 << 10 : 128 << 10] = bytes(64 << 10)
        after[96 << 10 : 100 << 10] = b"\6" * (4 << 10)
        assert raw_of(disk.active) == after
        assert qemu_check(disk.active) == {"corruptions": 0, "leaks": 0}


@pytest.mark.parametrize("strategy", ["pull", "both", "commit", "copy"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """Whichever write fails: all is as before, and nothing is leaked."""
    real = Target.write
    calls = 0

    def full(self: Target, offset: int, data: bytes) -> None:
        nonlocal calls
        calls -= 1
        if calls == 0 and offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
        real(self, offset, data)

    monkeypatch.setattr(Target, "write", full)
    failed = 0
    for number in range(1, 5):
        place = tmp_path / str(number)
        place.mkdir()
        disk = build(place, [parse_layer(line) for line in LINES])
        sizes = {path.name: path.stat().st_size for path in disk.paths}
        drop = [path.name for path in disk.paths[1:-1]]
        options = MergeOptions(strategy=strategy, engine="native")
        with open_chain(disk.active) as chain:
            plan = make_plan(chain, Request(drop=tuple(drop)), options)
        calls = number
        try:
            disk.merge(drop, options)
        except FailedMidway as error:
            assert "no space" in str(error)
            failed += 1
            disk.expect({path.name: path.name for path in disk.paths})
            assert {path.name: path.stat().st_size for path in disk.paths} == sizes
        del plan
        calls = 0
    assert failed >= 3


@pytest.mark.parametrize("kind", [NativeWrite, Compare, NativeSwitch, NativeFree])
def test_bitmaps_stay_valid_through_a_pull(tmp_path: Path, kind: type[Step]) -> None:
    """Those of the kept image are what they were, stopped or not."""
    lines = ["256k:A", "64k:- 64k:B 128k:-", "192k:- 64k:C"]
    disk = build(tmp_path, [parse_layer(line) for line in lines])
    qemu_img("bitmap", "--add", "-g", "64k", "-f", "qcow2", disk.active, "b")
    qemu_io(disk.active, ["write -q -P 7 0 4k"], "qcow2")
    disk.points[disk.active.name] = raw_of(disk.active)
    before = _marked(disk.active, tmp_path)
    drop = disk.paths[1].name
    options = MergeOptions(strategy="pull", engine="native")
    with open_chain(disk.active) as chain:
        plan = make_plan(chain, Request(drop=(drop,)), options)
        assert not plan.refusals, plan.refusals
        assert killed(plan, chain, lambda _, step: isinstance(step, kind))
    assert _marked(disk.active, tmp_path) == before
    recover(journals_at(tmp_path))
    assert _marked(disk.active, tmp_path) == before
    disk.expect({path.name: path.name for path in (disk.paths[0], disk.active)})


def _marked(image: Path, place: Path) -> str:
    """What the bitmap marks, said by qemu-img: which clusters it is merged into."""
    empty = place / ".marked"
    qemu_img("create", "-q", "-f", "qcow2", empty, "256k")
    qemu_img("bitmap", "--add", "-g", "64k", "-f", "qcow2", empty, "b")
    qemu_img("bitmap", "--merge", "b", "-b", image, "-F", "qcow2", "-f", "qcow2", empty, "b")
    told = qemu_img("info", "--output=json", "-f", "qcow2", image).stdout
    content = empty.read_bytes()
    empty.unlink()
    assert '"in-use"' not in told
    return content.hex()
