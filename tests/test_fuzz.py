"""Hostile images by the thousand, and the harness itself: each of its detectors bites.

`QCHAIN_FUZZED` in the environment: how many mutants (default 5000), the seeds are counted up from
`QCHAIN_SEED` (default 0). `make fuzz` is the same with a million.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.draft import Draft
from fixtures.hexfile import from_hex, to_hex
from fixtures.hostile import Drafts, furnish, mutate
from fixtures.shapes import Shape, build_shapes
from fuzz.finds import confirm, mutant_of
from fuzz.probe import Probe, probe
from fuzz.stage import Stage
from fuzz.watch import run
from fuzz.worker import Plan, Prober

COUNT = int(os.environ.get("QCHAIN_FUZZED", "5000"))
FIRST_SEED = int(os.environ.get("QCHAIN_SEED", "0"))
FINDS = sorted((Path(__file__).parent / "finds").glob("*.hex"))
MIB = 1 << 20


@pytest.fixture(scope="module")
def shapes() -> list[Shape]:
    return build_shapes()


@pytest.fixture(scope="module")
def few(shapes: list[Shape]) -> list[Shape]:
    """Small ones, quick to put on disk."""
    return [shape for shape in shapes if shape.name in ("512", "raw base", "v2 snapshots")]


def test_no_mutant_is_a_find(shapes: list[Shape], tmp_path: Path) -> None:
    plan = Plan(shapes, probe, FIRST_SEED, COUNT, command_every=max(1, COUNT // 20))
    result = run(plan, keep=tmp_path)
    assert result.finds == {}, [path.read_text()[:2000] for path in result.kept]
    assert result.done == COUNT
    assert result.commands >= 20
    # Mutants that are all refused at once would prove nothing, nor would mutants that are not.
    assert 0.3 < result.opened / result.done < 0.8


# --- the harness bites --------------------------------------------------------------------


def harmless(image: Path, number: int, secret: bytes | None) -> Probe:
    return Probe(True, 0)


def fragile(image: Path, number: int, secret: bytes | None) -> Probe:
    """A parser with a bug: it believes the size of the L1 table."""
    entries = int.from_bytes(image.read_bytes()[36:40], "big")
    if entries > 1000:
        raise IndexError(entries)
    return Probe(True, 0)


def spins(image: Path, number: int, secret: bytes | None) -> Probe:
    while number == 3:
        pass
    return Probe(True, 0)


def sleeps(image: Path, number: int, secret: bytes | None) -> Probe:
    if number == 3:
        time.sleep(60)
    return Probe(True, 0)


def allocates(image: Path, number: int, secret: bytes | None) -> Probe:
    if number == 3:
        bytes(b"x" * (400 * MIB))
    return Probe(True, 0)


def asks_too_much(image: Path, number: int, secret: bytes | None) -> Probe:
    if number == 3:
        bytearray(1 << 40)
    return Probe(True, 0)


def dies(image: Path, number: int, secret: bytes | None) -> Probe:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return Probe(True, 0)


@pytest.mark.parametrize(
    ("bug", "seconds", "cause"),
    [
        (spins, 0.5, "hang: over 0.5 s"),
        (sleeps, 0.5, "hang: over 0.5 s"),
        (allocates, 20, "memory: over 300 MiB"),
        (asks_too_much, 20, "memory: MemoryError at test_fuzz.py:.*"),
        (dies, 20, "crash: SIGKILL|crash: exit -9"),
    ],
)
def test_each_detector_bites(few: list[Shape], bug: Prober, seconds: float, cause: str) -> None:
    """Shapes take turns: number 3 is the mutant of three seeds, for each shape one."""
    plan = Plan(few, bug, 0, 30, seconds=seconds, command_every=0)
    result = run(plan, workers=2)
    assert sum(result.finds.values()) == 3, result.finds
    for found in result.finds:
        assert re.fullmatch(cause, found), found
    assert result.done == 30, "the run goes on after a find"


def test_a_harmless_probe_finds_nothing(few: list[Shape]) -> None:
    result = run(Plan(few, harmless, 0, 300, command_every=0), workers=2)
    assert (result.done, result.finds, result.false_alarms) == (300, {}, 0)
    assert result.peak < 50 * MIB


def test_a_find_is_small_and_can_be_repeated(few: list[Shape], tmp_path: Path) -> None:
    plan = Plan(few, fragile, 0, 1500, command_every=0)
    result = run(plan, keep=tmp_path)
    (cause,) = result.finds
    assert cause.startswith("exception: IndexError at test_fuzz.py:")
    assert len(result.kept) == 2, "of one cause only the first are kept"
    for path in result.kept:
        text = path.read_text()
        assert len(text) < 1500, "most of the image is zeroes now"
        image = next(iter(from_hex(text).values()))
        assert int.from_bytes(image[36:40], "big") > 1000
        assert "IndexError" in path.with_suffix(".txt").read_text()
        seed = int(text.split("seed ")[1].split(",")[0])
        assert confirm(plan, seed, mutant_of(plan, seed)) is not None


def test_what_does_not_happen_again_is_no_find(few: list[Shape]) -> None:
    plan = Plan(few, harmless, 0, 1)
    assert confirm(plan, 0, mutant_of(plan, 0)) is None


# --- the mutants ---------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_mutant(shapes: list[Shape]) -> None:
    for seed in range(3 * len(shapes)):
        shape = shapes[seed % len(shapes)]
        if sum(map(len, shape.files.values())) > MIB:
            continue
        drafts, others = Drafts(shape), Drafts(shape)
        mutate(others, seed + 1)
        others.undo()
        what = mutate(drafts, seed)
        assert mutate(others, seed) == what
        mutant = drafts.mutant(what)
        assert mutant == others.mutant(what)
        third = Drafts(shape)
        third.apply(mutant)
        for name in shape.files:
            assert bytes(drafts.files[name]) == bytes(third.files[name])
        drafts.undo()
        assert {name: bytes(draft) for name, draft in drafts.files.items()} == shape.files


def test_every_structure_is_changed_in_every_way(shapes: list[Shape]) -> None:
    kinds: Counter[str] = Counter()
    drafts = {shape.name: Drafts(shape) for shape in shapes if "2M" not in shape.name}
    names = sorted(drafts)
    for seed in range(4000):
        one = drafts[names[seed % len(names)]]
        what = mutate(one, seed)
        one.undo()
        for part in what.split("; "):
            words = part.partition(": ")[2]
            kinds[words.partition(" in ")[2].partition(" at ")[0] or words.split(" ")[0]] += 1
    for kind in (
        *("header", "extensions", "L1", "L2", "refcount table", "refcount block", "snapshot table"),
        *("snapshot L1", "snapshot L2", "bitmap directory", "bitmap table", "bitmap"),
        *("LUKS header", "compressed stream", "backing name", "backing format", "data file name"),
        *("pointer", "backing", "data", "disk", "bomb"),
    ):
        assert kinds[kind] >= 10, (kind, kinds)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_a_draft_is_a_bytearray_that_forgets(data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=1, max_size=64))
    draft, model = Draft(raw), bytearray(raw)
    for _ in range(data.draw(st.integers(0, 8))):
        if data.draw(st.booleans()):
            size = data.draw(st.integers(1, 90))
            draft.resize(size)
            model = bytearray(bytes(model[:size]).ljust(size, b"\0"))
        else:
            offset, piece = data.draw(st.integers(0, 100)), data.draw(st.binary(max_size=20))
            draft.put(offset, piece)
            piece = piece[: max(0, len(model) - offset)]
            model[offset : offset + len(piece)] = piece
    assert bytes(draft) == bytes(model)
    # The original, given the size and the patches, is the changed one.
    again = bytearray(raw[: len(model)].ljust(len(model), b"\0"))
    for offset, piece in draft.patches():
        again[offset : offset + len(piece)] = piece
    assert again == model
    draft.undo()
    assert bytes(draft) == raw and draft.patches() == []


@given(st.dictionaries(st.sampled_from(("a", "b.raw")), st.binary(max_size=200)))
@settings(deadline=None)
def test_hex_text_gives_the_files_back(files: dict[str, bytes]) -> None:
    assert from_hex(to_hex(files, ["two\nlines", "file x 7"])) == files


@pytest.mark.parametrize("line", ["file a", "file a x", "00 zz", "00", "10 aabb"])
def test_what_is_no_hex_text_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="not a line"):
        from_hex(f"{'file a 16' if line[0] in '01' else ''}\n{line}\n")


def test_the_stage_shows_drafts_and_clears(few: list[Shape], tmp_path: Path) -> None:
    for number, shape in enumerate(few):
        stage = Stage(tmp_path / str(number), shape)
        rng = random.Random(number)
        for seed in rng.sample(range(10000), 60):
            mutate(stage.drafts, seed)
            stage.show()
            for name, draft in stage.drafts.files.items():
                assert (stage.directory / name).read_bytes() == bytes(draft)
            stage.clear()
            for name, raw in shape.files.items():
                assert (stage.directory / name).read_bytes() == raw
        stage.close()


# --- headers, and what was found before -----------------------------------------------------


@pytest.fixture(scope="module")
def stages(
    shapes: list[Shape], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Stage]]:
    place = tmp_path_factory.mktemp("stages")
    found = {
        shape.name: Stage(place / str(number), shape)
        for number, shape in enumerate(shapes)
        if sum(map(len, shape.files.values())) < MIB
    }
    yield found
    for stage in found.values():
        stage.close()


@given(data=st.data())
@settings(
    deadline=None, max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_header_bytes(stages: dict[str, Stage], data: st.DataObject) -> None:
    stage = stages[data.draw(st.sampled_from(sorted(stages)))]
    draft = stage.drafts.files[stage.drafts.shape.active]
    number = st.one_of(
        st.binary(min_size=1, max_size=8),
        st.integers(0, 63).map(lambda bit: (1 << bit).to_bytes(8, "big")),
        st.integers(0, len(draft) // 512).map(lambda sector: (sector * 512).to_bytes(8, "big")),
    )
    changes = st.lists(st.tuples(st.integers(4, 160), number), min_size=1, max_size=6)
    for offset, piece in data.draw(changes):
        draft.put(offset, piece)
    if data.draw(st.integers(0, 9)) == 9:
        draft.resize(data.draw(st.integers(1, 4096)))
    stage.show()
    try:
        started = time.process_time()
        probe(stage.image, data.draw(st.integers(0, 47)), stage.drafts.shape.secret)
        assert time.process_time() - started < 2
    finally:
        stage.clear()


@pytest.mark.parametrize("find", FINDS, ids=lambda path: path.stem)
def test_finds_stay_mended(find: Path, tmp_path: Path) -> None:
    files = from_hex(find.read_text())
    for name, raw in files.items():
        with (tmp_path / name).open("wb") as out:
            out.truncate(len(raw))
            for start in range(0, len(raw), 4096):
                if any(raw[start : start + 4096]):
                    out.seek(start)
                    out.write(raw[start : start + 4096])
    image = tmp_path / next(iter(files))
    furnish(tmp_path, image.name)
    for number in (0, 1, 2, 5, 6, 10):  # all that is done to some only
        started = time.process_time()
        probe(image, number)
        assert time.process_time() - started < 2, number


def test_there_are_finds_to_look_at() -> None:
    assert FINDS
