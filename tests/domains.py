"""What the tests of domain commands share: the judgement, by libvirt and qemu-img alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import libvirt
from libvirtd import Guest
from stopping import dies

from fixtures.oracle import qemu_check, qemu_info

__all__ = ["Before", "backing_chain", "dying", "follows", "goes_on", "judge", "stands"]


@dataclass(frozen=True)
class Before:
    """The records before a change, and what every point then read."""

    definition: str
    records: Mapping[str, str]
    current: str | None

    @classmethod
    def of(cls, guest: Guest) -> Before:
        records = {name: guest.record(name) for name in guest.names()}
        return cls(guest.xml(), records, guest.current())

    def parent(self, name: str) -> str | None:
        found = re.search(r"<parent>\s*<name>(.*?)</name>", self.records[name])
        return None if found is None else found[1]

    def survivor(self, name: str | None, gone: set[str]) -> str | None:
        """The nearest ancestor (or itself) that is not among `gone`."""
        while name is not None and name in gone:
            name = self.parent(name)
        return name


def backing_chain(path: Path) -> list[str]:
    """The file names of a chain, the active one first, as qemu-img reads them."""
    out = [str(path)]
    while "backing-filename" in (info := qemu_info(Path(out[-1]), fmt_of(Path(out[-1])))):
        out.append(str(Path(info["full-backing-filename"])))
    return out


def masked(record: str) -> str:
    """A record without what a deletion may change: its parent, the names of its overlays."""
    head, disks, tail = re.split(r"(<disks>.*?</disks>)", record, maxsplit=1, flags=re.S)
    head = re.sub(r"\s*<parent>.*?</parent>", "", head, flags=re.S)
    return head + re.sub(r"<source file='.*?'/>", "", disks) + tail


def judge(guest: Guest, before: Before, gone: set[str], *, extra: set[str] | None = None) -> None:
    """After the snapshots `gone` were deleted, everything else is as it was, and true.

    Args:
        extra: further files that may be in the directory.
    """
    left = set(before.records) - gone
    assert set(guest.names()) == left
    assert guest.xml() == before.definition, "the definition has changed"
    assert guest.current() == before.survivor(before.current, gone)
    expected = {"cd.iso", *(extra or set())}
    for target in guest.targets:
        live = guest.live(target)
        expected.add(live.name)
        assert guest.read(live) == guest.points["live", target], f"{target}: the live image"
        chain = backing_chain(live)
        at: str | None = guest.current()
        active = set()
        while at is not None:
            active.add(at)
            at = before.survivor(before.parent(at), gone)
        for name in left:
            record = guest.record(name)
            state = Path(guest.source(record, target))
            expected.add(state.name)
            assert guest.read(state) == guest.points[name, target], f"{name} on {target}"
            overlay = guest.overlay(record, target)
            assert Path(overlay).exists(), f"{name}: its overlay {overlay} is gone"
            if name in active:
                assert overlay == chain[chain.index(str(state)) - 1], f"{name}: its overlay"
            else:
                expected.add(Path(overlay).name)
            # The format that the record says is the file's.
            assert f"<driver type='{fmt_of(Path(overlay))}'/>" in disk_of(record, target)
        for path in chain:
            if fmt_of(Path(path)) == "qcow2":
                assert qemu_check(Path(path)) == {"corruptions": 0, "leaks": 0}, path
    for name in left:
        record = guest.record(name)
        assert masked(record) == masked(before.records[name]), f"the record of {name} has changed"
        parent = re.search(r"<parent>\s*<name>(.*?)</name>", record)
        assert (parent[1] if parent else None) == before.survivor(before.parent(name), gone)
    assert {path.name for path in guest.directory.iterdir()} == expected


def fmt_of(path: Path) -> str:
    with path.open("rb") as file:
        return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"


def disk_of(record: str, target: str) -> str:
    disks = record.split("<disks>")[1].split("</disks>")[0]
    return disks.split(f"<disk name='{target}'")[1].split("</disk>")[0]


def goes_on(guest: Guest, name: str = "after") -> None:
    """libvirt itself goes on: a start with the guest paused, a snapshot, and its own delete."""
    flag = libvirt.VIR_DOMAIN_START_PAUSED
    guest.handle.createWithFlags(flag)
    guest.handle.destroy()
    guest.snapshot(name)
    guest.write()
    live = {target: guest.points["live", target] for target in guest.targets}
    guest.handle.snapshotLookupByName(name).delete(0)
    for target in guest.targets:
        assert guest.read(guest.live(target)) == live[target]


def follows(guest: Guest) -> None:
    """Current and its ancestors have the live chain's images as overlays; all else is there."""
    at, names = guest.current(), set()
    while at is not None:
        names.add(at)
        found = re.search(r"<parent>\s*<name>(.*?)</name>", guest.record(at))
        at = None if found is None else found[1]
    for target in guest.targets:
        chain = backing_chain(guest.live(target))
        assert guest.read(guest.live(target)) == guest.points["live", target]
        for name in guest.names():
            record = guest.record(name)
            state = guest.source(record, target)
            assert guest.read(Path(state)) == guest.points[name, target], name
            if name in names:
                assert guest.overlay(record, target) == chain[chain.index(state) - 1], name
            elif guest.handle.snapshotLookupByName(name).numChildren():
                assert Path(guest.overlay(record, target)).exists(), name
    # No snapshot that libvirt 9.9 would delete together with its state has a state still needed.
    for name in guest.names():
        leaf = not guest.handle.snapshotLookupByName(name).numChildren()
        if leaf and name != guest.current():
            for target in guest.targets:
                state = guest.source(guest.record(name), target)
                assert state not in backing_chain(guest.live(target))
                for other in set(guest.names()) - {name}:
                    needed = guest.source(guest.record(other), target)
                    assert state not in backing_chain(Path(needed)), (name, other)
    # What libvirt 9.9 would delete when it reverts: the overlays of the current one.
    current = guest.current()
    for target in guest.targets if current else ():
        assert guest.overlay(guest.record(str(current)), target) == str(guest.live(target))
    listed = guest.connection.lookupByName(guest.name)
    assert listed.isActive() == 0


def stands(guest: Guest, before: Before, gone: set[str]) -> None:
    """At any moment: the guest reads right, records name files, surviving states are as taken."""
    for target in guest.targets:
        live = guest.live(target)
        assert guest.read(live) == guest.points["live", target]
        for name in guest.names():
            record = guest.record(name)
            state, overlay = guest.source(record, target), guest.overlay(record, target)
            assert Path(state).exists() and Path(overlay).exists(), name
            if name not in gone:
                assert guest.read(Path(state)) == guest.points[name, target], name
    assert set(before.records) - gone <= set(guest.names())


def dying(work: Callable[[Callable[[str], None]], None], number: int) -> bool:
    """Do `work` in a child that is killed before its change `number`; whether it came to that."""
    seen = 0

    def look(_: str) -> None:
        nonlocal seen
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    return dies(lambda: work(look))


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
