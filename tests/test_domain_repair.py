"""`qchain domain repair`: merges by hand, and what libvirt leaves behind, made true again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
from cli_runner import run
from domains import follows, goes_on, qemu_img
from libvirtd import Daemon, Guest


@pytest.fixture
def guest(libvirtd: Daemon, tmp_path: Path) -> Iterator[Guest]:
    made = Guest.define(libvirtd, tmp_path / "images", "mended", ("vda", "vdb"))
    made.grow("s1", "s2", "s3")
    # As if the snapshots were of yesterday: what is written from now on is later.
    old = time.time() - 3600
    for path in made.directory.iterdir():
        os.utime(path, (old, old))
    yield made
    made.remove()


def repair(libvirtd: Daemon, guest: Guest) -> str:
    shown = run("domain", "repair", guest.name, "-c", libvirtd.uri, "--dry-run")
    assert shown.code == 0, shown.err
    done = run("domain", "repair", guest.name, "-c", libvirtd.uri, "--yes")
    assert done.code == 0, done.err
    again = run("domain", "repair", guest.name, "-c", libvirtd.uri)
    assert (again.code, again.out) == (0, "mended: the records are true\n"), again.err
    return done.out


def by_hand(guest: Guest, how: str, middle: str, below: str, above: str) -> None:
    """Merge `middle` away on every disk, as people do."""
    time.sleep(1.1)
    for target in guest.targets:
        file = {name: guest.directory / f"{target}.{name}" for name in (middle, below, above)}
        if how == "commit":
            qemu_img("commit", "-d", "-f", "qcow2", "-b", file[below], file[middle])
            words = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", file[below]]
        else:
            words = ["rebase", "-f", "qcow2", "-F", "qcow2", "-b", file[below]]
        qemu_img(*words, file[above])
        file[middle].unlink()


def test_true_records_are_left_alone(libvirtd: Daemon, guest: Guest) -> None:
    done = run("domain", "repair", "mended", "-c", libvirtd.uri)
    assert (done.code, done.out) == (0, "mended: the records are true\n")


@pytest.mark.parametrize(("how", "lost"), [("commit", "s1"), ("pull", "s2")])
def test_a_middle_image_merged_by_hand(libvirtd: Daemon, guest: Guest, how: str, lost: str) -> None:
    """Both leave the same names; the point that is lost is not the same."""
    by_hand(guest, how, "s1", "img", "s2")
    line = run("domain", "delete-snapshot", "mended", "s3", "--yes", "-c", libvirtd.uri).fails(3)
    assert "qchain domain repair mended" in line
    said = repair(libvirtd, guest)
    assert ("committed" in said) == (how == "commit") and "lost" in said
    assert guest.names() == sorted({"s1", "s2", "s3"} - {lost})
    follows(guest)
    assert run("domain", "delete-snapshot", "mended", "s3", "--yes", "-c", libvirtd.uri).code == 0
    follows(guest)
    goes_on(guest)


def test_where_the_disks_do_not_agree_a_person_decides(libvirtd: Daemon, guest: Guest) -> None:
    """A commit that had nothing to write looks like a pull."""
    by_hand(guest, "commit", "s1", "img", "s2")
    os.utime(guest.directory / "vdb.img", (1, 1))
    done = run("domain", "repair", "mended", "-c", libvirtd.uri, "--yes", "--json")
    assert done.code == 1 and "vdb.s1" in done.err
    assert {each["kind"] for each in done.json["left"]} >= {"missing-state"}
    assert guest.names() == ["s1", "s2", "s3"]
    words = ["domain", "repair", "mended", "-c", libvirtd.uri, "--yes", "--merged-by"]
    assert "'hope'" in run(*words, "hope").fails(2)
    done = run(*words, "commit")
    assert done.code == 0, done.err
    assert guest.names() == ["s2", "s3"]
    follows(guest)


def test_the_live_image_committed_by_hand(libvirtd: Daemon, guest: Guest) -> None:
    time.sleep(1.1)
    for target in guest.targets:
        here = guest.directory
        qemu_img("commit", "-d", "-f", "qcow2", here / f"{target}.s3")
        (here / f"{target}.s3").unlink()
    repair(libvirtd, guest)
    assert guest.names() == ["s1", "s2"] and guest.current() == "s2"
    follows(guest)
    goes_on(guest)


def test_wrong_words_in_records(libvirtd: Daemon, guest: Guest) -> None:
    here = guest.directory
    redefine = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    overlay = f"<source file='{here}/vda.s1'/>"
    first = guest.record("s1").replace(overlay, f"<source file='{here}/vda.s3'/>", 1)
    guest.handle.snapshotCreateXML(first, redefine)
    second = guest.record("s2").replace("<driver type='qcow2'/>", "<driver type='raw'/>", 1)
    guest.handle.snapshotCreateXML(second, redefine)
    third = guest.record("s3").replace("<name>s2</name>", "<name>s1</name>")
    guest.handle.snapshotCreateXML(third, redefine)
    said = repair(libvirtd, guest)
    for words in ("s1, vda: its overlay is", "s2, vda: its overlay", "s3: its parent is s2"):
        assert words in said, said
    assert guest.current() == "s3"
    follows(guest)
    goes_on(guest)


def test_what_cannot_be_mended_is_named(libvirtd: Daemon, guest: Guest) -> None:
    live = guest.live("vda")
    live.rename(guest.directory / "away")
    done = run("domain", "repair", "mended", "-c", libvirtd.uri, "--yes")
    assert done.code == 1 and "cannot be mended: vda" in done.err and "vda.s3" in done.err
    (guest.directory / "away").rename(live)
