"""The XML of domains and snapshots, on libvirt's own test driver: no daemon, no files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from qchain.domains.apply import Records, bring
from qchain.domains.connection import Host
from qchain.domains.edit import (
    Place,
    clear_deleting,
    moved,
    with_overlay,
    with_parent,
    with_source,
)
from qchain.domains.inventory import Inventory, look
from qchain.domains.records import real, snapshot_of
from qchain.domains.truth import problems_of
from qchain.domains.xmltext import same
from qchain.errors import FailedMidway

DOMAIN = """<domain type='test' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>paper</name><uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid>
  <title>a &lt;b&gt; &amp; "c"</title>
  <metadata><o:order xmlns:o='http://shop.example/' o:id='7'> kept </o:order></metadata>
  <memory unit='KiB'>65536</memory><vcpu>1</vcpu><os><type>hvm</type></os>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
      <source file='{live}'/><target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file='/cd.iso'/><target dev='hdc' bus='ide'/>
      <readonly/></disk>
  </devices>
</domain>"""
SNAPSHOT = """<domainsnapshot><name>{name}</name><description>d &amp; e</description>
<state>shutoff</state>{parent}<creationTime>{created}</creationTime><memory snapshot='no'/>
<disks><disk name='vda' snapshot='external' type='file'><driver type='qcow2'/>
<source file='{overlay}'/></disk></disks>{domain}
<cookie><cpu mode='custom' match='exact'><model>qemu64</model></cpu></cookie>
</domainsnapshot>"""


@pytest.fixture
def host() -> Iterator[Host]:
    with Host("test:///default") as opened:
        yield opened


@pytest.fixture
def handle(host: Host) -> Any:
    made = host.connection.defineXML(DOMAIN.format(live="/i/v.2"))
    redefine = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    for number, name in enumerate(("s1", "s2")):
        above = f"<parent><name>s{number}</name></parent>" if number else ""
        state = f"/i/v.{number}" if number else "/i/v"
        xml = SNAPSHOT.format(
            name=name,
            parent=above,
            created=1000 + number,
            overlay=f"/i/v.{number + 1}",
            domain=DOMAIN.format(live=state),
        )
        current = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if number else 0
        made.snapshotCreateXML(xml, redefine | current)
    return made


def test_what_records_say(host: Host, handle: Any) -> None:
    found = look(host, "paper")
    assert found.disks.keys() == {"vda"} and found.disks["vda"].source.path == "/i/v.2"
    assert list(found.snapshots) == ["s1", "s2"] and found.current == "s2"
    first, second = found.snapshots.values()
    assert (first.keeps("vda"), second.keeps("vda")) == ("/i/v", "/i/v.1")
    assert second.overlays["vda"].source is not None
    assert second.overlays["vda"].source.path == "/i/v.2"
    assert (first.parent, second.parent, first.description) == (None, "s1", "d & e")
    assert [each.name for each in found.line("s2")] == ["s2", "s1"]
    assert [each.name for each in found.children(None)] == ["s1"]


def test_what_is_not_changed_comes_back_as_it_was(host: Host, handle: Any) -> None:
    inventory = look(host, "paper")
    old = inventory.snapshots["s2"].xml
    assert "order" in old and "kept" in old
    assert same(moved(old, {}), old) and same(with_parent(old, "s1"), old)
    assert same(with_parent(with_parent(old, None), "s1"), old)
    there = with_overlay(old, "vda", Place("/i/new", "qcow2"))
    assert same(there.replace("/i/new", "/i/v.2"), old) and there != old
    assert same(clear_deleting(old, "vda"), old)


def test_records_that_are_brought_and_read_back(host: Host, handle: Any) -> None:
    inventory = look(host, "paper")
    old = Records(
        inventory.xml,
        {name: each.xml for name, each in inventory.snapshots.items()},
        inventory.current,
    )
    texts = dict(old.snapshots)
    texts["s1"] = with_overlay(texts["s1"], "vda", Place("/i/'odd' & <name>", "raw"))
    said: list[str] = []
    goal = Records(old.domain, texts, "s2")
    bring(host, handle, old, goal, said.append)
    assert said == ["redefine s1"]
    assert look(host, "paper").snapshots["s1"].overlays["vda"].source is not None
    bring(host, handle, old, goal, said.append)
    assert said == ["redefine s1"], "it is done already"
    # What libvirt does not take is told, and what is not ours in it as well.
    broken = Records(old.domain, texts | {"s1": with_parent(texts["s1"], "nobody")}, "s2")
    with pytest.raises(FailedMidway, match="nobody"):
        bring(host, handle, old, broken)


def test_files_that_go_are_taken_out_of_explicit_chains(tmp_path: Path) -> None:
    def store(name: str, below: str) -> str:
        return (
            f"<backingStore type='file'><format type='qcow2'/><source file='{name}'/>"
            f"{below}</backingStore>"
        )

    end = "<backingStore/>"
    whole = DOMAIN.format(live="/i/v.2").replace(
        "<target dev='vda'",
        store("/i/v.1", store("/i/v", store("/i/base", end))) + "<target dev='vda'",
    )
    go = {real("/i/v.1"): Place("/i/v.2", "qcow2"), real("/i/v"): Place("/i/v.2", "qcow2")}
    wanted = whole.replace(
        store("/i/v.1", store("/i/v", store("/i/base", end))), store("/i/base", end)
    )
    assert same(moved(whole, go), wanted)
    renamed = with_source(whole, "vda", Place("/i/x", "raw"))
    assert "backingStore" not in renamed and "/i/x" in renamed and "/cd.iso" in renamed


def test_a_revert_by_a_newer_libvirt_is_understood() -> None:
    """<revertDisks> names the overlay that is live, <disks> one that is gone."""
    xml = SNAPSHOT.format(
        name="s1", parent="", created=1, overlay="/i/v.1", domain=DOMAIN.format(live="/i/v")
    )
    xml = xml.replace(
        "</disks>",
        "</disks><revertDisks><disk name='vda' snapshot='external' type='file'>"
        "<driver type='qcow2'/><source file='/i/v.9'/></disk></revertDisks>",
    )
    found = snapshot_of(xml, lambda _pool, _volume: None)
    assert found.reverted["vda"].source is not None
    assert found.reverted["vda"].source.path == "/i/v.9"
    back = with_overlay(xml, "vda", Place("/i/v.2", "qcow2"))
    assert "revertDisks" not in back and "/i/v.2" in back


def test_images_that_are_not_there_are_problems(host: Host, handle: Any) -> None:
    from qchain.chain.gate import Gate
    from qchain.domains.files import all_files

    inventory: Inventory = look(host, "paper")
    (found,) = problems_of(inventory, all_files(inventory, Gate()))
    assert found.kind == "missing-live" and "/i/v.2" in found.text
