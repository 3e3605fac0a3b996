"""A target that is cut, and qemu-img killed at it: found by `make torture`.

Its header has the new length then, and its tables still map what lay beyond. Nothing shows that
until the image grows again.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from fixtures.build import build_chain
from fixtures.language import parse_layer
from fixtures.oracle import qemu_check, qemu_img, raw_of
from qchain.run.cut_short import cut_again, mapped_beyond
from qchain.run.qemu_img import QemuImg
from torture.cases import Case, Image
from torture.kills import Tally, go_on, prepared
from torture.process import Spot, count, run

K = 1024
LENGTH = 96 * K


def half_cut(path: Path, length: int = LENGTH) -> Path:
    """As qemu-img leaves it when it is killed after the header: offset 24 has the length."""
    with path.open("r+b") as file:
        file.seek(24)
        file.write(length.to_bytes(8, "big"))
    return path


@pytest.mark.parametrize(
    "line",
    [
        "[cluster=16k size=1M] 768k:A 256k:0",
        "[cluster=16k ext size=1M] 512k:A 512k:B",
        "[cluster=512 size=8M] 64k:A 6M:- 1M:B",
        "[cluster=4k v2 size=1M] 1M:A",
    ],
)
def test_nothing_is_mapped_beyond_the_end(tmp_path: Path, line: str) -> None:
    path = half_cut(build_chain(tmp_path, [line]).active)
    shown = raw_of(path)
    assert mapped_beyond(path) is not None
    cut_again(path, LENGTH, QemuImg().run)
    assert mapped_beyond(path) is None
    assert raw_of(path) == shown and len(shown) == LENGTH
    assert qemu_check(path) == {"corruptions": 0, "leaks": 0}
    qemu_img("resize", "-q", "-f", "qcow2", path, "1M")
    assert raw_of(path) == shown.ljust(1024 * K, b"\0")


def test_of_a_whole_image_nothing_is_changed(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["[cluster=16k size=96k] 96k:A"]).active
    before = path.read_bytes()
    cut_again(path, LENGTH, QemuImg().run)
    assert path.read_bytes() == before


def longer_below(seed: int) -> Case:
    """A base that is cut when the shorter overlay is committed into it."""
    base = parse_layer("[cluster=16k size=1M] 768k:A 256k:0")
    top = parse_layer("[cluster=1k size=72k] 27k:B 18k:-")
    images = (
        Image("i0.qcow2", None, base, False, 0o640, 0),
        Image("i1.qcow2", "i0.qcow2", top, False, 0o600, 0),
    )
    return Case(seed, images, ("i0.qcow2",), "commit", "kept")


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize("kind", ["both", "qemu"])
def test_killed_while_it_cuts(scratch: Path, kind: str, back: bool) -> None:
    """At each of its writes; whichever way one goes on, the judge finds no corruption."""
    work = scratch / "work"
    place, planned = prepared(0, scratch, scratch / "images", work, longer_below)
    place.restore()
    _, counts = count(place.case.argv(place.directory), work)
    cut = next(at for at, calls in counts.theirs.items() if calls["ftruncate"])
    hits = 0
    for call, most in sorted(counts.theirs[cut].items()):
        for nth in range(1, most + 1):
            place.restore()
            spot = Spot(kind, cut, call, nth)
            hits += run(place.case.argv(place.directory), work, spot).hit
            place.intact(planned, str(spot))
            go_on(place, planned, work, Random(0), Tally(), back=back)
    assert hits >= 3
