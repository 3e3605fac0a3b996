"""More of `qchain domain`: its ways to ask and to answer, libvirt's own delete beside ours."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest
from cli_runner import command, run
from domains import Before, backing_chain, dying, goes_on, judge, masked
from libvirtd import Daemon, Guest

from qchain.domains.connection import Host
from qchain.domains.delete import Wishes, planned_deletion
from qchain.domains.inventory import look
from qchain.domains.work import Tools, carry_out
from qchain.errors import FailedMidway, Refused
from qchain.plan.options import MergeOptions


@pytest.fixture
def guest(libvirtd: Daemon, tmp_path: Path) -> Iterator[Guest]:
    made = Guest.define(libvirtd, tmp_path / "images", "more", ("vda", "vdb"))
    made.grow("s1", "s2")
    yield made
    made.remove()


def test_the_newest_as_libvirt_deletes_it(libvirtd: Daemon, guest: Guest, tmp_path: Path) -> None:
    """The same contents and records; only the name of the live image is kept by ours."""
    other = Guest.define(libvirtd, tmp_path / "other", "theirs", ("vda", "vdb"))
    other.grow("s1", "s2")
    other.handle.snapshotLookupByName("s2").delete(0)
    done = run("domain", "delete-snapshot", "more", "s2", "--yes", "-c", libvirtd.uri)
    assert done.code == 0, done.err
    assert guest.names() == other.names() == ["s1"]
    assert guest.current() == other.current() == "s1"

    def plain(xml: str) -> list[str]:
        xml = re.sub(r"<uuid>.*?</uuid>|<creationTime>.*?</creationTime>", "", xml)
        xml = re.sub(r"/vd(.)\.s[12]'", r"/vd\1.live'", xml)
        xml = xml.replace(str(other.directory), str(guest.directory))
        return sorted(xml.replace("<name>theirs</name>", "<name>more</name>").split())

    assert plain(guest.record("s1")) == plain(other.record("s1"))
    assert plain(guest.xml()) == plain(other.xml())
    for target in guest.targets:
        assert guest.read(guest.live(target)) == other.read(other.live(target))
        ours, theirs = (backing_chain(each.live(target)) for each in (guest, other))
        assert len(ours) == len(theirs) == 2
        assert guest.read(Path(ours[1])) == other.read(Path(theirs[1]))
    other.remove()


def test_it_asks_and_tells(libvirtd: Daemon, guest: Guest) -> None:
    before = Before.of(guest)
    words = ("domain", "delete-snapshot", "more", "s1", "-c", libvirtd.uri)
    assert "--yes" in command(*words).fails(2)
    dry = run(*words, "--dry-run")
    assert dry.code == 0 and "qemu-img" in dry.out
    assert Before.of(guest) == before
    assert "no snapshot of more" in run(*words[:3], "none", "-c", libvirtd.uri).fails(2)
    assert "--names" not in run(*words, "--keep-files", "--yes").fails(3)
    document = run(*words, "--yes", "--json").json
    assert document["domain"] == "more" and document["deleted_snapshots"] == ["s1"]
    assert document["verified"]["identical"] and document["current"] == "s2"
    judge(guest, before, {"s1"})
    assert run("domain", "delete-snapshot", "--help").code == 0


def test_a_transient_guest_is_refused(libvirtd: Daemon, guest: Guest) -> None:
    xml = guest.xml().replace("<name>more</name>", "<name>brief</name>")
    xml = re.sub(r"<uuid>.*?</uuid>", "", xml)
    brief = guest.connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
    line = run("domain", "snapshot", "brief", "x", "-c", libvirtd.uri).fails(3)
    assert "is running" in line
    shown = run("domain", "snapshot", "brief", "x", "-c", libvirtd.uri, "--json")
    assert any("transient" in each for each in shown.json["refusals"])
    brief.destroy()


def test_an_unfinished_change_is_seen_and_found_from_every_directory(
    libvirtd: Daemon, guest: Guest, tmp_path: Path
) -> None:
    """The second disk lies elsewhere: there is a pointer to the journal."""
    away = tmp_path / "away"
    away.mkdir()
    saved = Before.of(guest)
    metadata = libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY
    for name in ("s2", "s1"):
        guest.handle.snapshotLookupByName(name).delete(metadata)
    for path in guest.directory.glob("vdb.*"):
        shutil.move(path, away)
    words = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b"]
    for upper, lower in (("s1", "img"), ("s2", "s1")):
        subprocess.run([*words, away / f"vdb.{lower}", away / f"vdb.{upper}"], check=True)

    def there(xml: str) -> str:
        return xml.replace(f"{guest.directory}/vdb.", f"{away}/vdb.")

    guest.handle = guest.connection.defineXML(there(saved.definition))
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    guest.handle.snapshotCreateXML(there(saved.records["s1"]), flags)
    current = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
    guest.handle.snapshotCreateXML(there(saved.records["s2"]), flags | current)

    assert dying(deleting(libvirtd.uri, "s1"), 12)
    for place, name in ((guest.directory, "vda"), (away, "vdb")):
        line = run("merge", place / f"{name}.s2", "--flatten", "--yes").fails(3)
        assert "not finished" in line
        words = ["domain", "delete-snapshot", "more", "s2", "--yes", "-c", libvirtd.uri]
        assert run(*words).code == 3
    for words in (["revert", "more", "s2"], ["snapshot", "more", "x"], ["repair", "more"]):
        line = run("domain", *words, "-c", libvirtd.uri).fails(3)
        assert "a change is not finished" in line
    shown = run("domain", "show", "more", "-c", libvirtd.uri)
    assert "'qchain recover" in shown.err
    done = run("recover", away)
    assert done.out == "domain more: delete s1: finished\n", done.err
    assert guest.names() == ["s2"] and not list(away.glob(".qchain*"))
    assert not list(guest.directory.glob(".qchain*"))
    for target in guest.targets:
        assert guest.read(guest.live(target)) == guest.points["live", target]
    goes_on(guest)


def deleting(uri: str, name: str) -> Callable[[Callable[[str], None]], None]:
    def work(before: Callable[[str], None]) -> None:
        with (
            Host(uri) as host,
            planned_deletion(host, look(host, "more"), Wishes((name,)), f"delete {name}") as found,
        ):
            assert not found.refusals, found.refusals
            carry_out(host, found.job, Tools(before=before), found.merge)

    return work


@pytest.mark.parametrize("strategy", ["pull", "commit"])
def test_a_failure_puts_all_back_and_says_what_is_spoilt(
    libvirtd: Daemon, guest: Guest, strategy: str
) -> None:
    before = Before.of(guest)

    def fail(what: str) -> None:
        if what == "Compare":
            raise FailedMidway("disk", "is on fire")

    with Host(libvirtd.uri) as host:
        wishes = Wishes(("s2",), MergeOptions(strategy=strategy))
        with (
            planned_deletion(host, look(host, "more"), wishes, "delete s2") as found,
            pytest.raises(FailedMidway, match="is on fire") as caught,
        ):
            carry_out(host, found.job, Tools(before=fail), found.merge)
    assert ("no longer read as before" in str(caught.value)) == (strategy == "commit")
    assert ("files and records are as before" in str(caught.value)) == (strategy == "pull")
    assert Before.of(guest) == before and not list(guest.directory.glob(".qchain*"))
    if strategy == "pull":
        judge(guest, before, set())
    done = run("domain", "delete-snapshot", "more", "s2", "--yes", "-c", libvirtd.uri)
    assert done.code == 0, done.err
    judge(guest, before, {"s2"})


def test_what_a_person_does_meanwhile_is_not_undone(libvirtd: Daemon, guest: Guest) -> None:
    """Between the stop and the recovery the guest ran, was edited, and got a snapshot."""
    assert dying(deleting(libvirtd.uri, "s1"), 12)
    guest.write()
    edited = guest.xml().replace("kept &amp; true", "edited")
    guest.handle = guest.connection.defineXML(edited)
    guest.snapshot("meanwhile")
    for back in ([], ["--back"]):
        line = run("recover", guest.directory, *back).fails(3)
        assert "meanwhile" in line and "was taken after" in line
    metadata = libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY
    guest.handle.snapshotLookupByName("meanwhile").delete(metadata)
    redefine = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    current = redefine | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
    guest.handle.snapshotCreateXML(guest.record("s2"), current)
    guest.handle = guest.connection.defineXML(edited)
    for target in guest.targets:
        (guest.directory / f"{target}.meanwhile").unlink()
    done = run("recover", guest.directory)
    assert done.code == 0, done.err
    assert guest.names() == ["s2"] and "edited" in guest.xml()
    for target in guest.targets:
        assert guest.read(guest.live(target)) == guest.points["live", target]
        assert (
            guest.read(Path(guest.source(guest.record("s2"), target)))
            == (guest.points["s2", target])
        )


def test_records_that_changed_while_a_person_thought_are_not_written_over(
    libvirtd: Daemon, guest: Guest
) -> None:
    with Host(libvirtd.uri) as host:
        wishes = Wishes(("s1",))
        with planned_deletion(host, look(host, "more"), wishes, "delete s1") as found:
            guest.snapshot("late")
            before = Before.of(guest)
            with pytest.raises(Refused, match="has changed since it was planned"):
                carry_out(host, found.job, Tools(), found.merge)
    assert Before.of(guest) == before and not list(guest.directory.glob(".qchain*"))
    judge(guest, before, set())


def test_a_journal_that_was_never_whole_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".qchain-abcdef.domain.new").write_text('{"qchain_do')
    assert run("recover", tmp_path).out == "Nothing is unfinished.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{}", "not a journal"),
        ("[" * 100000, "not a journal"),
        ('{"qchain_domain": 1, "see": "/none/.qchain-1.domain"}', "no such file"),
        ('{"qchain_domain": 1, "token": 5}', "not a journal"),
        ('{"qchain_domain": 1, "see": "beside"}', "not a journal"),
    ],
)
def test_a_journal_that_is_none_is_not_followed(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / ".qchain-abcdef.domain").write_text(text)
    assert why in run("recover", tmp_path).fails(4)
    (tmp_path / ".qchain-abcdef.domain").chmod(0o666)
    assert "can write to it" in run("recover", tmp_path).fails(3)


def test_a_mark_that_a_stopped_deletion_left_is_mended(libvirtd: Daemon, guest: Guest) -> None:
    before = Before.of(guest)
    marked = guest.record("s1").replace(
        f"{guest.directory}/vda.s1'/>", f"{guest.directory}/vda.s1'/><snapshotDeleteInProgress/>", 1
    )
    guest.handle.snapshotCreateXML(marked, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)
    assert "snapshotDeleteInProgress" in guest.record("s1")
    words = ["-c", libvirtd.uri, "--yes"]
    assert "repair more" in run("domain", "delete-snapshot", "more", "s2", *words).fails(3)
    done = run("domain", "repair", "more", *words)
    assert done.code == 0 and "mark of a deletion" in done.out
    assert masked(guest.record("s1")) == masked(before.records["s1"])
    assert "snapshotDeleteInProgress" not in guest.record("s1")
