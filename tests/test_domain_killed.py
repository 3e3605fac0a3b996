"""A change to a domain that is killed: at every moment all is true, and `recover` ends it.

`QCHAIN_DOMAINS=all`: every step; else some of them, spread over the whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runner import run
from domains import Before, dying, goes_on, judge, stands
from libvirtd import Daemon, Guest

from qchain.domains.connection import Host
from qchain.domains.delete import Wishes, planned_deletion
from qchain.domains.inventory import look
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
