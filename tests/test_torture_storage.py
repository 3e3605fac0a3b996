"""Power lost, disks that fill up, tools that lie, guests that race: what of it is in CI.

The same as `make torture`, with other numbers; `QCHAIN_SEED` (default 0) gives others.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fixtures.build import build_chain
from torture.__main__ import SCENARIOS, Work, run, summary
from torture.disks import KINDS, LoopDisk
from torture.full import Full
from torture.liars import LIES, Liars
from torture.power import Power
from torture.races import Guest, Races

SEED = int(os.environ.get("QCHAIN_SEED", "0"))


@pytest.mark.parametrize("number", range(4))
def test_power_lost(scratch: Path, tmp_path: Path, number: int) -> None:
    """20 times in all, on XFS and on ext4."""
    tally = Power(SEED + number, scratch, 5, tmp_path).run()
    assert not tally.losses
    assert tally.tries == tally.notes[KINDS[(SEED + number) % 2]] == 5


@pytest.mark.parametrize("number", range(2))
def test_a_disk_that_fills_up(scratch: Path, tmp_path: Path, number: int) -> None:
    tally = Full(SEED + number, scratch, 5, tmp_path).run()
    assert not tally.losses and tally.tries == 5


def test_a_tool_that_lies(scratch: Path, tmp_path: Path) -> None:
    tally = Liars(SEED + 1, scratch, 10, tmp_path).run()
    assert not tally.losses
    assert tally.notes["caught"] >= 5
    assert sum(tally.notes[lie] > 0 for lie in LIES) >= 3


def test_a_guest_that_races(scratch: Path, tmp_path: Path) -> None:
    tally = Races(SEED + 1, scratch, 5, tmp_path).run()
    assert not tally.losses
    assert tally.notes["guest wrote"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_without_power_only_what_was_flushed_is_left(scratch: Path, kind: str) -> None:
    with LoopDisk(kind, scratch) as disk:
        durable, other = disk.mount / "durable", disk.mount / "other"
        durable.write_bytes(b"x" * 100_000)
        disk.flush()
        other.write_bytes(b"x" * 100_000)
        durable.write_bytes(b"y" * 100_000)
        disk.cut()
        with pytest.raises(OSError):
            (disk.mount / "new").touch()
        disk.again()
        assert b"y" not in durable.read_bytes()
        assert not other.exists() or b"x" not in other.read_bytes()


def test_a_guest_writes_where_nobody_keeps_it_out(scratch: Path) -> None:
    """Otherwise there would be no race to lose."""
    image = build_chain(scratch / "images", ["64k:A", "64k:-"]).active
    guest = Guest([image], {image.name: 64 << 10}, scratch / "log", 1)
    for _ in range(3):
        guest.try_once()
    assert len(guest.wrote()) == guest.attempts == 3


def test_the_command(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All scenarios through the loop of `make torture`, its table, and a loss in it."""
    works = [Work(name, int(name == "kills"), SEED + 50) for name in SCENARIOS]
    run(works, 2, scratch)
    table = summary(works, 1.0)
    assert table.splitlines()[1].split()[:3] == ["kills", "1", "0"]
    assert table.endswith(f"the next seed is {SEED + 51}")
    works[0].tally.losses.append("seed 7: nothing is there")
    assert "kills: seed 7: nothing is there" in summary(works, 1.0)
