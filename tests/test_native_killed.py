"""Merges by the native engine that are stopped anywhere, by a kill or a power loss."""

from __future__ import annotations

import contextlib
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from random import Random

import pytest
from merging import Disk, build
from native_stops import killed_within, lose
from stopping import killed

from fixtures.language import parse_layer
from fixtures.oracle import QemuError, qemu_check
from qchain.chain.chain import Chain, open_chain
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Request
from qchain.run.recover import journals_at, recover

SEEDS = int(os.environ.get("QCHAIN_NATIVE_LOSSES", "0"))
"""How often everything is stopped everywhere; 0: some of it once, for a short run."""

CHAINS = {
    "standard": ["256k:A", "64k:- 64k:B 128k:-", "64k:C 64k:- 128k:D", "64k:- 32k:E 160k:-"],
    "small clusters": [
        "[cluster=4k] 64k:A",
        "[cluster=512] 4k:B 60k:-",
        "[cluster=1k] 2k:- 8k:a 54k:-",
        "[cluster=512] 1k:C 512:0 62k:- 512:D",
    ],
    "subclusters": [
        "[raw] 256k:A",
        "[ext cluster=64k] 2k:B 62k:- 64k:b 128k:-",
        "[ext cluster=64k] 4k:- 2k:C 58k:- 64k:- 64k:0 64k:-",
        "[ext cluster=64k] 6k:D 250k:-",
    ],
    "longer": ["128k:A", "[size=256k] 64k:B 192k:-", "[size=192k] 192k:-", "[size=320k] 320k:-"],
}


ALL = [(name, strategy) for name in CHAINS for strategy in ("pull", "both", "commit")]
SOME = [("standard", "both"), ("subclusters", "pull")]
SOME_LOST = [*SOME, ("small clusters", "commit"), ("longer", "commit")]


def _readable(disk: Disk) -> None:
    """The kept points read right, and no metadata is worse than leaked."""
    for path in (disk.paths[0], disk.active):
        disk.expect_point(path)
    for path in disk.paths:
        if path.exists() and path.suffix == ".qcow2":
            # A dropped image above one that is gone cannot be opened.
            gone = contextlib.suppress(QemuError) if path != disk.active else nullcontext()
            with gone:
                assert qemu_check(path)["corruptions"] == 0, path.name


def _whole(disk: Disk) -> None:
    disk.expect({path.name: path.name for path in (disk.paths[0], disk.active)})


def _stopped_plan(disk: Disk, chain: Chain, strategy: str) -> Plan:
    drop = tuple(path.name for path in disk.paths[1:-1])
    plan = make_plan(chain, Request(drop=drop), MergeOptions(strategy=strategy, engine="native"))
    assert not plan.refusals, plan.refusals
    return plan


@pytest.mark.parametrize(("name", "strategy"), ALL if SEEDS else SOME)
def test_killed_between_steps(tmp_path: Path, name: str, strategy: str) -> None:
    layers = [parse_layer(line) for line in CHAINS[name]]
    number, ended = 0, False
    while not ended:
        for back in (False, True) if SEEDS else (bool(number % 2),):
            place = tmp_path / f"{number}{back}"
            place.mkdir()
            disk = build(place, layers)
            with open_chain(disk.active) as chain:
                plan = _stopped_plan(disk, chain, strategy)
                ended = not killed(plan, chain, lambda seen, _, number=number: seen == number)
            _readable(disk)
            _recovered(disk, back)
            shutil.rmtree(place)
        number += 1
    assert number > 10


def _recovered(disk: Disk, back: bool) -> None:
    """Forward, or back where that is still possible; nothing is left over, nor leaked."""
    journals = journals_at(disk.directory)
    if back and journals:
        try:
            (outcome,) = recover(journals, back=True, give_up_dropped=True)
        except Exception as error:
            assert "only go forward" in str(error), error
        else:
            assert outcome.outcome == "put back"
            lost = {path.name for path in outcome.altered}
            disk.expect({p.name: p.name for p in disk.paths if p.name not in lost}, complete=False)
            assert sorted(p.name for p in disk.directory.iterdir()) == sorted(
                p.name for p in disk.paths
            )
            for path in disk.paths:
                if path.suffix == ".qcow2":
                    assert qemu_check(path) == {"corruptions": 0, "leaks": 0}, path.name
            return
        journals = journals_at(disk.directory)
    recover(journals)
    _whole(disk)


@pytest.mark.parametrize(("name", "strategy"), ALL if SEEDS else SOME_LOST)
def test_killed_and_power_lost_within_the_writes(tmp_path: Path, name: str, strategy: str) -> None:
    layers = [parse_layer(line) for line in CHAINS[name]]
    calls = 0
    for seed in range(max(1, SEEDS)):
        number, ended = 0, False
        while not ended:
            random = Random(f"{strategy} {number} {seed}")
            place = tmp_path / str(number)
            place.mkdir()
            disk = build(place, layers)
            log = tmp_path / "log"
            with open_chain(disk.active) as chain:
                plan = _stopped_plan(disk, chain, strategy)
                ended = not killed_within(
                    plan, chain, log, lambda _, seen, number=number: seen == number
                )
            if not ended:
                if number % 4 and SEEDS == 0:
                    lose(log, random)
                    _readable(disk)
                else:
                    _readable(disk)
                    lose(log, random)
                    _readable(disk)
                _recovered(disk, random.random() < 0.3)
            shutil.rmtree(place)
            number += 1
        calls = number
    assert calls > 8
