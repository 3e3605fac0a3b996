"""What `qchain domain` refuses, with nothing changed; and what it takes all the same."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
from cli_runner import run
from domains import Before, goes_on, judge, qemu_img
from libvirtd import Daemon, Guest

from fixtures.oracle import qemu_info


@pytest.fixture
def guest(libvirtd: Daemon, tmp_path: Path) -> Iterator[Guest]:
    made = Guest.define(libvirtd, tmp_path / "images", "wary", ("vda",))
    made.grow("s1", "s2")
    yield made
    made.remove()


def refused(libvirtd: Daemon, guest: Guest, *words: str) -> str:
    """A deletion is refused, and nothing is changed."""
    before = Before.of(guest)
    files = {path: path.stat().st_mtime_ns for path in guest.directory.iterdir()}
    line = run(
        "domain", "delete-snapshot", guest.name, "s1", "--yes", "-c", libvirtd.uri, *words
    ).fails(3)
    assert Before.of(guest) == before
    assert {path: path.stat().st_mtime_ns for path in guest.directory.iterdir()} == files
    return line


def test_a_running_guest_gets_the_live_command(libvirtd: Daemon, guest: Guest) -> None:
    guest.handle.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    line = refused(libvirtd, guest)
    here = guest.directory
    command = f"virsh blockcommit wary vda --base {here}/vda.img --top {here}/vda.s1 --wait"
    assert "is running" in line and command in line
    for words in (["revert", "wary", "s1", "--yes"], ["snapshot", "wary", "new"]):
        assert "is running" in run("domain", *words, "-c", libvirtd.uri).fails(3)
    guest.handle.destroy()


def test_a_managed_save_forbids_it(libvirtd: Daemon, guest: Guest) -> None:
    guest.handle.create()
    guest.handle.managedSave(0)
    assert "managed save" in refused(libvirtd, guest)
    guest.handle.managedSaveRemove(0)


def test_another_domain_that_uses_a_file_forbids_it(
    libvirtd: Daemon, guest: Guest, tmp_path: Path
) -> None:
    other = Guest.define(libvirtd, tmp_path / "other", "other", ("vda",))
    disk = other.live("vda")
    named = other.xml().replace(str(disk), f"{guest.directory}/vda.img")
    other.connection.defineXML(named)
    assert "domain other uses it" in refused(libvirtd, guest)
    # A linked clone in a directory of its own: found by the header of its image.
    other.connection.defineXML(named.replace(f"{guest.directory}/vda.img", str(disk)))
    disk.unlink()
    qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", guest.directory / "vda.img", disk)
    assert str(disk) in refused(libvirtd, guest)
    other.remove()


def test_an_overlay_that_no_record_names_forbids_it_unless_it_is_kept_too(
    libvirtd: Daemon, guest: Guest
) -> None:
    before = Before.of(guest)
    stray = guest.directory / "stray.qcow2"
    qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", guest.directory / "vda.img", stray)
    shown = guest.read(stray)
    assert "stray.qcow2" in refused(libvirtd, guest)
    words = ["domain", "delete-snapshot", "wary", "s1", "--yes", "-c", libvirtd.uri]
    done = run(*words, "--also", stray)
    assert done.code == 0, done.err
    assert guest.read(stray) == shown
    judge(guest, before, {"s1"}, extra={"stray.qcow2"})


def test_a_checkpoint_forbids_it(libvirtd: Daemon, guest: Guest) -> None:
    guest.handle.snapshotLookupByName("s2").delete(0)
    flag = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
    disks = "<disks><disk name='vda' checkpoint='bitmap' bitmap='c1'/></disks>"
    guest.handle.checkpointCreateXML(
        "<domaincheckpoint><name>c1</name><creationTime>1</creationTime>"
        f"{disks}{guest.xml()}</domaincheckpoint>",
        flag,
    )
    line = refused(libvirtd, guest)
    assert "checkpoint" in line and "c1" in line
    metadata = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
    guest.handle.checkpointLookupByName("c1").delete(metadata)


def test_an_image_in_use_forbids_it(libvirtd: Daemon, guest: Guest) -> None:
    argv = ["qemu-io", "-f", "qcow2", guest.live("vda")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as holder:
        for _ in range(100):
            line = run(*("domain", "delete-snapshot", "wary", "s1", "--yes", "-c", libvirtd.uri))
            if line.code == 3:
                break
        assert "in use" in line.err
        holder.communicate()
    assert not list(guest.directory.glob(".qchain-*"))


def test_a_block_device_has_no_place_for_overlays(
    libvirtd: Daemon, guest: Guest, tmp_path: Path
) -> None:
    backing = tmp_path / "device"
    backing.write_bytes(bytes(1 << 20))
    argv = ["losetup", "--find", "--show", backing]
    device = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    try:
        other = Guest.define(libvirtd, tmp_path / "other", "other", ("vda",), "raw")
        xml = other.xml().replace("<disk type='file' device='disk'>", "<disk type='block' "
                                  "device='disk'>")  # fmt: skip
        xml = xml.replace(f"<source file='{other.live('vda')}'/>", f"<source dev='{device}'/>")
        other.connection.defineXML(xml)
        line = run("domain", "snapshot", "other", "x", "-c", libvirtd.uri).fails(3)
        assert f"{device} is a block device" in line
        assert run("domain", "show", "other", "-c", libvirtd.uri).code == 0
        other.remove()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_records_that_are_not_true_forbid_it(libvirtd: Daemon, guest: Guest) -> None:
    gone = guest.directory / "vda.img"
    shutil.copy(gone, guest.directory / "copy")
    flat = guest.directory / "vda.s1"
    qemu_img("rebase", "-f", "qcow2", "-b", "", flat)
    gone.unlink()
    line = refused(libvirtd, guest)
    assert "vda.img" in line and "qchain domain repair wary" in line
    (guest.directory / "copy").rename(gone)


@pytest.mark.parametrize("kind", ["relative", "explicit", "volume"])
def test_what_libvirt_lets_one_write(libvirtd: Daemon, guest: Guest, kind: str) -> None:
    here = guest.directory
    if kind == "relative":
        for upper, lower in (("s1", "img"), ("s2", "s1")):
            words = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", f"vda.{lower}"]
            qemu_img(*words, here / f"vda.{upper}")
    elif kind == "explicit":
        stores = ""
        for name in ("img", "s1"):
            stores = (
                "<backingStore type='file'><format type='qcow2'/>"
                f"<source file='{here}/vda.{name}'/>{stores or '<backingStore/>'}</backingStore>"
            )
        source = f"<source file='{here}/vda.s2'/>"
        definition = guest.xml().replace(source, source + stores)
        guest.handle = guest.connection.defineXML(definition)
    else:
        pool = guest.connection.storagePoolCreateXML(
            f"<pool type='dir'><name>p</name><target><path>{here}</path></target></pool>"
        )
        definition = guest.xml().replace(
            f"<disk type='file' device='disk'>\n      <driver name='qemu' type='qcow2'/>\n"
            f"      <source file='{here}/vda.s2'/>",
            "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>"
            "<source pool='p' volume='vda.s2'/>",
        )
        guest.handle = guest.connection.defineXML(definition)
        assert "type='volume'" in guest.xml()
    done = run("domain", "delete-snapshot", "wary", "s1", "--yes", "-c", libvirtd.uri)
    assert done.code == 0, done.err
    live = here / "vda.s2"
    assert guest.read(live) == guest.points["live", "vda"]
    assert guest.read(here / "vda.s1") == guest.points["s2", "vda"]
    backing = qemu_info(live)["backing-filename"]
    assert backing == ("vda.s1" if kind == "relative" else f"{here}/vda.s1")
    assert guest.names() == ["s2"] and f"{here}/vda.img" not in guest.xml()
    if kind == "volume":
        assert "vda.img" not in pool.listVolumes() and "type='volume'" in guest.xml()
        pool.destroy()
    else:
        if kind == "explicit":
            assert f"<source file='{here}/vda.s1'/>" in guest.xml()
        goes_on(guest)
