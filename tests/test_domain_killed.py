"""A change to a domain that is killed: at every moment all is true, and `recover` ends it.

`QCHAIN_DOMAINS=all`: every step; else some of them, spread over the whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest
from cli_runner import run
from domains import Before, dying, goes_on, judge, stands
from libvirtd import Daemon, Guest

from qchain.chain.gate import Gate
from qchain.domains.branch import plan_revert, plan_snapshot
from qchain.domains.connection import Host
from qchain.domains.delete import Wishes, planned_deletion
from qchain.domains.inventory import Inventory, look
from qchain.domains.work import Tools, carry_out

ALL = os.environ.get("QCHAIN_DOMAINS") == "all"


def deleting(uri: str, names: tuple[str, ...]) -> Callable[[Callable[[str], None]], None]:
    def work(before: Callable[[str], None]) -> None:
        with (
            Host(uri) as host,
            planned_deletion(host, look(host, "dying"), Wishes(names), "delete") as deletion,
        ):
            assert not deletion.refusals, deletion.refusals
            carry_out(host, deletion.job, Tools(before=before), deletion.merge)

    return work


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_a_deletion_killed_at_any_step(libvirtd: Daemon, tmp_path: Path, back: bool) -> None:
    guest = Guest.define(libvirtd, tmp_path / "images", "dying", ("vda", "vdb"))
    names = ["s1", "s2", "s3"]
    guest.grow(*names)
    before = Before.of(guest)
    shutil.copytree(guest.directory, tmp_path / "saved")
    gone = {"s2"} if back else {"s1", "s3"}
    # Primes: in time every step is met, whatever else is chosen.
    number, stride, met = 0, 1 if ALL else (11 if back else 7), 0
    while dying(deleting(libvirtd.uri, tuple(sorted(gone))), number):
        met += 1
        stands(guest, before, gone)
        words = ["recover", guest.directory, *(["--back"] if back else [])]
        done = run(*words)
        if back and done.code == 3:
            done = run("recover", guest.directory)
            assert done.code == 0, done.err
            judge(guest, before, gone)
        elif back or not number:
            assert done.code == 0, done.err
            # Before the journal is written nothing has begun.
            judge(guest, before, set())
        else:
            assert done.code == 0, done.err
            judge(guest, before, gone)
        assert run("recover", guest.directory).out == "Nothing is unfinished.\n"
        guest.rewind(
            tmp_path / "saved", before.definition, [before.records[n] for n in names], "s3"
        )
        number += stride
    judge(guest, before, gone)
    goes_on(guest)
    guest.remove()
    assert met >= 4


@pytest.mark.parametrize("what", ["revert", "discard", "snapshot", "keep"])
def test_a_branch_killed_at_any_step(libvirtd: Daemon, tmp_path: Path, what: str) -> None:
    guest = Guest.define(libvirtd, tmp_path / "images", "dying", ("vda", "vdb"))
    names = ["s1", "s2"]
    guest.grow(*names)
    before = Before.of(guest)
    shutil.copytree(guest.directory, tmp_path / "saved")

    def work(look: Callable[[str], None]) -> None:
        with Host(libvirtd.uri) as host:
            inventory, gate = inventory_of(host), Gate()
            if what in ("revert", "discard"):
                branch = plan_revert(host, inventory, "s1", gate, discard=what == "discard")
            else:
                keep = what == "keep"
                branch = plan_snapshot(host, inventory, "new", gate, keep_active_name=keep)
            assert not branch.refusals, branch.refusals
            carry_out(host, branch.job, Tools(before=look))

    number, stride, met = 0, 1 if ALL else 3, 0
    point = "s1" if what in ("revert", "discard") else "live"
    wanted = {target: guest.points[point, target] for target in guest.targets}
    while dying(work, number):
        met += 1
        for target in guest.targets:
            # The guest can be started: it reads what it had, or what it is to have.
            old = guest.points["live", target]
            assert guest.read(guest.live(target)) in (old, wanted[target])
        back = met % 3 == 2
        done = run("recover", guest.directory, *(["--back"] if back else []))
        if done.code == 3:
            assert back and "go forward" in done.err
            done = run("recover", guest.directory)
            back = False
        assert done.code == 0, done.err
        unchanged = back or not number
        for target in guest.targets:
            kept = guest.points["live", target]
            assert guest.read(guest.live(target)) == (kept if unchanged else wanted[target])
            for name in names:
                state = Path(guest.source(guest.record(name), target))
                assert guest.read(state) == guest.points[name, target]
        if unchanged:
            judge(guest, before, set())
        assert run("recover", guest.directory).out == "Nothing is unfinished.\n"
        for name in set(guest.names()) - set(names):
            metadata = libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY
            guest.handle.snapshotLookupByName(name).delete(metadata)
        guest.rewind(
            tmp_path / "saved", before.definition, [before.records[n] for n in names], "s2"
        )
        number += stride
    guest.points |= {("live", target): wanted[target] for target in guest.targets}
    for target in guest.targets:
        assert guest.read(guest.live(target)) == wanted[target]
    goes_on(guest)
    guest.remove()
    assert met >= 3


def inventory_of(host: Host) -> Inventory:
    return look(host, "dying")
