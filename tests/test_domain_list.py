"""`qchain domain list` and `show`, against a libvirt of our own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runner import command, run
from libvirtd import Daemon, Guest


@pytest.fixture
def guest(libvirtd: Daemon, tmp_path: Path) -> Iterator[Guest]:
    made = Guest.define(libvirtd, tmp_path / "images", "shop", ("vda", "vdb"))
    made.grow("mon", "tue")
    yield made
    made.remove()


def test_which_file_is_which_snapshots_is_shown(libvirtd: Daemon, guest: Guest) -> None:
    shown = run("domain", "show", "shop", "-c", libvirtd.uri)
    assert shown.code == 0 and shown.err == ""
    lines = [" ".join(line.split()) for line in shown.out.splitlines()]
    assert "mon (about mon)" in lines and "tue (about tue) <- current" in lines
    roles = {line.split()[0]: line.rpartition("iB, root ")[2] for line in lines if "iB, " in line}
    assert roles["vda.img"] == "state of mon"
    assert roles["vda.mon"] == "overlay of mon, state of tue"
    assert roles["vdb.tue"] == "live, overlay of tue"
    document = run("domain", "show", "shop", "-c", libvirtd.uri, "--json").json
    assert [each["name"] for each in document["snapshots"]] == ["mon", "tue"]
    here = guest.directory
    assert document["snapshots"][1]["disks"][0] == {
        "disk": "vda",
        "mode": "external",
        "state": f"{here}/vda.mon",
        "overlay": f"{here}/vda.tue",
    }
    chain = [f"{here}/vda.{name}" for name in ("tue", "mon", "img")]
    assert document["disks"][0]["chain"] == chain and document["problems"] == []


def test_the_list_says_what_is_out_of_step(libvirtd: Daemon, guest: Guest) -> None:
    (fields,) = run("domain", "list", "-c", libvirtd.uri, "--json").json["domains"]
    assert (fields["name"], fields["depth"], fields["snapshots"]) == ("shop", 3, 2)
    assert fields["problems"] == [] and fields["shadowed_bytes"] > 0
    (guest.directory / "vda.img").rename(guest.directory / "gone")
    (fields,) = run("domain", "list", "-c", libvirtd.uri, "--json").json["domains"]
    assert {each["kind"] for each in fields["problems"]} == {"missing-live"}
    table = run("domain", "list", "-c", libvirtd.uri).out.splitlines()
    assert table[1].split()[:3] == ["shop", "shut", "off"]
    (guest.directory / "gone").rename(guest.directory / "vda.img")


def test_what_is_not_there_is_named(libvirtd: Daemon, tmp_path: Path) -> None:
    line = run("domain", "show", "nobody", "-c", libvirtd.uri).fails(2)
    assert "nobody: is no domain of" in line
    away = f"qemu:///system?socket={tmp_path}/none"
    line = run("domain", "list", "--connect", away).fails(4)
    assert "cannot be reached" in line and "start libvirtd" in line


def test_without_libvirt_python_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "libvirt.py").write_text("raise ImportError\n")
    done = command("domain", "list", PYTHONPATH=str(tmp_path))
    line = done.fails(4)
    assert "libvirt-python: is not installed" in line and "pip install" in line
