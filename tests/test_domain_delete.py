"""`qchain domain delete-snapshot` against a real libvirt: files and records together."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runner import Result, run
from domains import Before, goes_on, judge
from libvirtd import Daemon, Guest

Make = Callable[..., Guest]


@pytest.fixture
def make(libvirtd: Daemon, tmp_path: Path) -> Iterator[Make]:
    """Guests by number of snapshots, targets, format of the base."""
    made: list[Guest] = []

    def one(count: int, targets: tuple[str, ...] = ("vda",), fmt: str = "qcow2") -> Guest:
        number = len(made)
        guest = Guest.define(libvirtd, tmp_path / f"g{number}", f"g{number}", targets, fmt)
        made.append(guest)
        guest.grow(*(f"s{n}" for n in range(1, count + 1)))
        return guest

    yield one
    for guest in made:
        guest.remove()


def delete(libvirtd: Daemon, guest: Guest, *names: str) -> Result:
    done = run("domain", "delete-snapshot", guest.name, *names, "--yes", "-c", libvirtd.uri)
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
@pytest.mark.parametrize(
    "gone", [{"s2"}, {"s1"}, {"s3"}, {"s1", "s2", "s3"}], ids=["middle", "first", "newest", "all"]
)
def test_snapshots_of_two_disks(libvirtd: Daemon, make: Make, gone: set[str], fmt: str) -> None:
    """Rows P3 to P8 and T18: the other points read as before, and libvirt goes on."""
    guest = make(3, ("vda", "vdb"), fmt)
    before = Before.of(guest)
    delete(libvirtd, guest, *sorted(gone))
    judge(guest, before, gone)
    goes_on(guest)


def test_any_subset_in_any_order(libvirtd: Daemon, make: Make) -> None:
    for seed in range(int(os.environ.get("QCHAIN_WALKS", "1"))):
        subsets(libvirtd, make, random.Random(seed))


def subsets(libvirtd: Daemon, make: Make, chance: random.Random) -> None:
    for count, several in itertools.product((4, 6), (False, True)):
        targets = ("vda", "vdb")[: chance.randrange(1, 3)]
        guest = make(count, targets, chance.choice(("qcow2", "raw")))
        before = Before.of(guest)
        names = guest.names()
        gone = chance.sample(names, chance.randrange(1, count))
        if several:
            delete(libvirtd, guest, *gone)
        else:
            for name in gone:
                delete(libvirtd, guest, name)
        judge(guest, before, set(gone))
        goes_on(guest)
