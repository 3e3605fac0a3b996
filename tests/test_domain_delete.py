"""`qchain domain delete-snapshot` against a real libvirt: files and records together."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runner import Result, run
from domains import Before, backing_chain, goes_on, judge, qemu_img
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


@pytest.mark.parametrize("strategy", ["pull", "commit", "both", "copy"])
def test_every_way_of_merging_keeps_names(libvirtd: Daemon, make: Make, strategy: str) -> None:
    """Rows T3 to T14: whichever image takes the data, the names that are kept stay."""
    guest = make(3)
    before = Before.of(guest)
    # In the middle of three there is something to pull and something to commit.
    words = ["domain", "delete-snapshot", guest.name, "s1", "s2", "--yes", "-c", libvirtd.uri]
    done = run(*words, "--strategy", strategy, "--verify", "full", "--json")
    assert done.code == 0, done.err
    assert [each["chosen"] for each in done.json["groups"]] == [strategy]
    judge(guest, before, {"s1", "s2"})
    goes_on(guest)


def test_a_template_is_not_the_domains_to_delete(
    libvirtd: Daemon, make: Make, tmp_path: Path
) -> None:
    guest = make(0)
    template = tmp_path / "templates" / "golden.qcow2"
    template.parent.mkdir()
    guest.live("vda").rename(template)
    qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", template, guest.live("vda"))
    guest.grow("s1", "s2")
    before, content = Before.of(guest), template.read_bytes()
    words = ["domain", "flatten", guest.name, "--yes", "-c", libvirtd.uri]
    assert f"--allow {template.parent}" in run(*words).fails(3)
    assert run(*words, "--allow", template.parent).code == 0
    judge(guest, before, {"s1", "s2"})
    assert template.read_bytes() == content
    assert backing_chain(guest.live("vda")) == [str(guest.live("vda")), str(template)]
