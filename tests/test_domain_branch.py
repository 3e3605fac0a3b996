"""`qchain domain snapshot` and `revert`, and deletions where there are branches."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
from cli_runner import Result, command, run
from domains import Before, backing_chain, follows, goes_on, judge
from libvirtd import Daemon, Guest


@pytest.fixture
def guest(libvirtd: Daemon, tmp_path: Path) -> Iterator[Guest]:
    made = Guest.define(libvirtd, tmp_path / "images", "branched", ("vda", "vdb"))
    yield made
    made.remove()


def domain(libvirtd: Daemon, *words: str) -> Result:
    done = run("domain", *words, "-c", libvirtd.uri)
    assert done.code == 0, done.err
    return done


def revert(libvirtd: Daemon, guest: Guest, name: str, *more: str) -> list[Path]:
    """Returns the files that are left without being any snapshot's."""
    done = domain(libvirtd, "revert", guest.name, name, "--yes", "--json", *more).json
    for target in guest.targets:
        guest.points["live", target] = guest.points[name, target]
    return [Path(path) for path in done["left"]]


def test_there_and_back_again(libvirtd: Daemon, guest: Guest) -> None:
    guest.grow("s1", "s2", "s3")
    before = Before.of(guest)
    revert(libvirtd, guest, "s1")
    follows(guest)
    assert guest.current() == "s1"
    guest.grow("t1")
    revert(libvirtd, guest, "s3")
    follows(guest)
    guest.write()
    goes_on(guest)
    revert(libvirtd, guest, "t1")
    follows(guest)
    assert set(guest.names()) == {"s1", "s2", "s3", "t1"}
    for name in ("s2", "s3"):
        old, new = before.records[name], guest.record(name)
        assert old.split("<domain ")[1] == new.split("<domain ")[1]
    guest.write()
    for name in ("s2", "s1"):
        domain(libvirtd, "delete-snapshot", guest.name, name, "--yes")
        follows(guest)
    goes_on(guest)


def test_a_reverted_guest_is_defined_as_it_was(libvirtd: Daemon, guest: Guest) -> None:
    guest.grow("s1")
    definition = guest.xml()
    more = definition.replace("<title>kept &amp; true</title>", "<title>later</title>")
    guest.handle = guest.connection.defineXML(more)
    old = [str(guest.live(target)) for target in guest.targets]
    revert(libvirtd, guest, "s1")
    now = guest.xml()
    for target, name in zip(guest.targets, old, strict=True):
        now = now.replace(str(guest.live(target)), name)
    # Controllers come in another order when a definition is read once more.
    assert sorted(now.split()) == sorted(definition.split())


def test_discard_removes_the_abandoned_branch_only(libvirtd: Daemon, guest: Guest) -> None:
    guest.grow("s1", "s2")
    revert(libvirtd, guest, "s1", "--discard")
    follows(guest)
    names = {path.name for path in guest.directory.iterdir()}
    assert names == {"cd.iso"} | {
        f"{target}.{end}" for target in guest.targets for end in ("img", "s1", "revert-s1")
    }
    # Nobody is there to be asked.
    line = command("domain", "revert", guest.name, "s2", "--discard", "-c", libvirtd.uri).fails(2)
    assert "--yes" in line and guest.current() == "s1"


@pytest.mark.parametrize("keep", [False, True], ids=["T1", "T15"])
def test_a_snapshot_is_as_libvirt_would_take_it(libvirtd: Daemon, guest: Guest, keep: bool) -> None:
    guest.grow("s1")
    live = [str(guest.live(target)) for target in guest.targets]
    for target in guest.targets:
        guest.points["mine", target] = guest.points["live", target]
    more = ["--keep-active-name"] if keep else []
    domain(libvirtd, "snapshot", guest.name, "mine", "--description", "about mine", *more)
    follows(guest)
    assert guest.current() == "mine"
    assert ([str(guest.live(target)) for target in guest.targets] == live) == keep
    made = guest.record("mine")
    goes_on(guest)
    guest.write()
    guest.snapshot("theirs")
    theirs = guest.record("theirs")

    def bare(record: str) -> list[str]:
        # Controllers come in another order when a definition is read once more.
        record = re.sub(r"<parent>.*?</parent>|<creationTime>.*?</creationTime>", "", record,
                        flags=re.S)  # fmt: skip
        record = re.sub(r"<source file='[^']*/vd[^']*'/>", "<source/>", record)
        return sorted(record.replace("theirs", "mine").split())

    assert bare(made) == bare(theirs)
    before = Before.of(guest)
    domain(libvirtd, "delete-snapshot", guest.name, "mine", "--yes")
    judge(guest, before, {"mine"})


def test_a_disk_that_snapshots_leave_out_stays_as_it_is(libvirtd: Daemon, guest: Guest) -> None:
    out = guest.xml().replace("<disk type='file' device='disk'>", "<disk type='file' device='disk' "
                              "snapshot='no'>")  # fmt: skip
    # Only the second one.
    head, second = guest.xml().split("<target dev='vda'")[0], out.split("<target dev='vda'")[1]
    guest.handle = guest.connection.defineXML(f"{head}<target dev='vda'{second}")
    guest.write()
    guest.points["s1", "vda"] = guest.points["live", "vda"]
    domain(libvirtd, "snapshot", guest.name, "s1")
    assert [guest.live(target).name for target in guest.targets] == ["vda.s1", "vdb.img"]
    guest.write()
    guest.handle.snapshotCreateXML(
        "<domainsnapshot><name>s2</name></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY,
    )
    assert guest.live("vdb").name == "vdb.img"
    guest.write()
    domain(libvirtd, "revert", guest.name, "s1", "--yes", "--discard")
    assert guest.read(guest.live("vda")) == guest.points["s1", "vda"]
    assert guest.read(guest.live("vdb")) == guest.points["live", "vdb"]
    domain(libvirtd, "flatten", guest.name, "--disk", "vda", "--yes")
    assert guest.names() == [] and guest.read(guest.live("vda")) == guest.points["s1", "vda"]
    assert guest.read(guest.live("vdb")) == guest.points["live", "vdb"]


def test_flatten_is_row_t18(libvirtd: Daemon, guest: Guest) -> None:
    guest.grow("s1", "s2")
    before = Before.of(guest)
    line = run("domain", "flatten", guest.name, "--disk", "vda", "-c", libvirtd.uri).fails(3)
    assert "torn" in line
    domain(libvirtd, "flatten", guest.name, "--yes")
    judge(guest, before, {"s1", "s2"})
    assert guest.names() == [] and guest.current() is None
    for target in guest.targets:
        assert backing_chain(guest.live(target)) == [str(guest.live(target))]
    goes_on(guest)


def test_libvirts_own_delete_takes_the_live_branch(libvirtd: Daemon, guest: Guest) -> None:
    """Trap 2: current is the snapshot whose overlay is live, after libvirt deleted one too."""
    guest.grow("s1", "s2")
    revert(libvirtd, guest, "s1")
    guest.grow("t1")
    guest.handle.snapshotLookupByName("t1").delete(0)
    assert guest.current() == "s1"
    follows(guest)
    metadata = libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY
    assert metadata and guest.names() == ["s1", "s2"]


def test_a_walk_through_branches(libvirtd: Daemon, tmp_path: Path) -> None:
    """Random words, one after another: what was taken reads as taken, and libvirt goes on."""
    seeds = int(os.environ.get("QCHAIN_WALKS", "2"))
    for seed in range(seeds):
        walk(libvirtd, tmp_path, random.Random(seed), f"walk{seed}")


def walk(libvirtd: Daemon, tmp_path: Path, chance: random.Random, name: str) -> None:
    targets = ("vda", "vdb")[: chance.randrange(1, 3)]
    fmt = chance.choice(("qcow2", "raw"))
    guest = Guest.define(libvirtd, tmp_path / name, name, targets, fmt)
    guest.grow("a1", "a2")
    strays: dict[Path, bytes] = {}
    for number in range(8):
        present = guest.names()
        word = chance.choice(("take", "take", "revert", "delete", "delete"))
        if word == "take" or len(present) < 2:
            guest.write()
            taken = f"n{number}"
            if chance.random() < 0.5:
                guest.snapshot(taken)
            else:
                for target in targets:
                    guest.points[taken, target] = guest.points["live", target]
                more = ["--keep-active-name"] if chance.random() < 0.5 else []
                domain(libvirtd, "snapshot", name, taken, *more)
        elif word == "revert":
            more = ["--discard"] if chance.random() < 0.5 else []
            left = revert(libvirtd, guest, chance.choice(present), *more)
            assert not (left and more)
            strays |= {path: guest.read(path) for path in left}
            strays = {path: content for path, content in strays.items() if path.exists()}
        else:
            gone = chance.sample(present, chance.randrange(1, 3))
            tied = [path for path in strays if len(backing_chain(path)) > 1]
            words = [str(word) for path in tied for word in ("--also", path)]
            domain(libvirtd, "delete-snapshot", name, *gone, "--yes", *words)
        follows(guest)
        for path, content in strays.items():
            assert guest.read(path) == content, path
        listed = {path.name for path in guest.directory.iterdir()} - {path.name for path in strays}
        named = {Path(guest.source(guest.record(each), target)).name
                 for each in guest.names() for target in targets}  # fmt: skip
        assert listed == named | {"cd.iso"} | {guest.live(target).name for target in targets}
    domain(libvirtd, "show", name)
    goes_on(guest)
    guest.remove()
