"""A libvirt of the tests' own: a daemon in its own mount namespace, and guests for it.

/etc/libvirt, /var/lib/libvirt, /run/libvirt are directories of the tests there, so that the
machine's own libvirt is never touched and every worker has one. Needs root, no KVM, no systemd.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt

from fixtures.oracle import raw_of

__all__ = ["Daemon", "Guest", "daemon_in"]

CONFIGURATION = {
    "qemu.conf": (
        'user = "root"\ngroup = "root"\nsecurity_driver = "none"\ncgroup_controllers = [ ]\n'
        "namespaces = [ ]\n"
    ),
    "libvirtd.conf": 'auth_unix_rw = "none"\nauth_unix_ro = "none"\n',
    "virtlogd.conf": "",
}
START = """set -e
mkdir -p /run/libvirt /var/cache/libvirt /var/log/libvirt
for pair in run:/run/libvirt lib:/var/lib/libvirt etc:/etc/libvirt \\
    cache:/var/cache/libvirt log:/var/log/libvirt; do
    mount --bind "$1/${pair%%:*}" "${pair#*:}"
done
virtlogd -d -p "$1/virtlogd.pid"
exec libvirtd -p "$1/libvirtd.pid"
"""


@dataclass
class Daemon:
    """libvirtd and virtlogd, running; `uri` leads to them."""

    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def uri(self) -> str:
        return f"qemu:///system?socket={self.directory}/run/libvirt-sock"

    def connect(self) -> Any:
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        return libvirt.open(self.uri)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.directory / "virtlogd.pid").read_text()), signal.SIGTERM)


def daemon_in(directory: Path) -> Iterator[Daemon]:
    """Start one with its state in `directory`; ended when the generator is."""
    for name in ("run", "lib", "etc", "cache", "log"):
        (directory / name).mkdir(parents=True)
    for name, text in CONFIGURATION.items():
        (directory / "etc" / name).write_text(text)
    with (directory / "out").open("wb") as out:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "bash", "-c", START, "start",
             str(directory)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
        )  # fmt: skip
    daemon = Daemon(directory, process)
    try:
        for _ in range(300):
            with contextlib.suppress(libvirt.libvirtError):
                daemon.connect().close()
                break
            if process.poll() is not None:
                raise AssertionError((directory / "out").read_text())
            time.sleep(0.05)
        yield daemon
    finally:
        daemon.stop()


@dataclass
class Guest:
    """A shut-off guest with disks; what each of its points must read, by snapshot and disk."""

    connection: Any
    name: str
    directory: Path
    handle: Any
    targets: tuple[str, ...]
    points: dict[tuple[str, str], bytes] = field(default_factory=dict)
    written: int = 0

    # --- making ---------------------------------------------------------------------

    @classmethod
    def define(
        cls, daemon: Daemon, directory: Path, name: str, targets: Sequence[str], fmt: str = "qcow2"
    ) -> Guest:
        """A guest whose disks are new images of 1 MiB, `fmt` being their format."""
        directory.mkdir(parents=True, exist_ok=True)
        disks = ""
        for target in targets:
            path = directory / f"{target}.img"
            subprocess.run(["qemu-img", "create", "-q", "-f", fmt, path, "1M"], check=True)
            disks += (
                f"<disk type='file' device='disk'><driver name='qemu' type='{fmt}'/>"
                f"<source file='{path}'/><target dev='{target}' bus='virtio'/>"
                f"<serial>{target}-serial</serial></disk>"
            )
        (directory / "cd.iso").write_bytes(bytes(65536))
        xml = f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>{name}</name><title>kept &amp; true</title>
<metadata><shop:order xmlns:shop='http://shop.example/'>7</shop:order></metadata>
<memory unit='MiB'>16</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os><devices>{disks}
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>
<source file='{directory}/cd.iso'/><target dev='hdc' bus='ide'/><readonly/></disk>
<graphics type='vnc' passwd='sesame'><listen type='none'/></graphics></devices>
<qemu:commandline><qemu:env name='KEPT' value='yes'/></qemu:commandline></domain>"""
        connection = daemon.connect()
        return cls(connection, name, directory, connection.defineXML(xml), tuple(targets))

    def live(self, target: str) -> Path:
        """The live image of a disk, as the definition has it."""
        return Path(self.source(self.xml(), target))

    def write(self) -> None:
        """Let the guest write something on every disk: some new, some over older data."""
        self.written += 1
        for number, target in enumerate(self.targets):
            path = self.live(target)
            start = 64 * ((self.written * 3 + number) % 12)
            pattern = (self.written * 16 + number) % 255 + 1
            with path.open("rb") as file:
                fmt = "qcow2" if file.read(4) == b"QFI\xfb" else "raw"
            words = [f"write -P {pattern} {start}k 128k", f"write -P {pattern} 1000k 4k"]
            argv = ["qemu-io", "-f", fmt]
            for word in words:
                argv += ["-c", word]
            subprocess.run([*argv, path], check=True, stdout=subprocess.DEVNULL)
            self.points["live", target] = self.read(path)

    def snapshot(self, name: str, xml: str = "") -> None:
        """libvirt takes an external snapshot; what it keeps is noted."""
        for target in self.targets:
            self.points[name, target] = self.read(self.live(target))
        text = f"<domainsnapshot><name>{name}</name><description>about {name}</description>{xml}"
        flag = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        self.handle.snapshotCreateXML(f"{text}</domainsnapshot>", flag)

    def grow(self, *names: str) -> None:
        """Write, and take a snapshot, by each name; then write once more."""
        for name in names:
            self.write()
            self.snapshot(name)
        self.write()

    def remove(self) -> None:
        """Away with it and its files."""
        with contextlib.suppress(libvirt.libvirtError):
            self.handle.destroy()
        for each in self.handle.listAllSnapshots(0):
            each.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
        self.handle.undefine()
        self.connection.close()
        shutil.rmtree(self.directory)

    def rewind(self, saved: Path, definition: str, records: Sequence[str], current: str) -> None:
        """Files and records as they were: `records` parents first, files from `saved`."""
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
        for each in self.handle.listAllSnapshots(0):
            each.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
        shutil.rmtree(self.directory)
        shutil.copytree(saved, self.directory)
        self.handle = self.connection.defineXML(definition)
        for record in records:
            is_current = f"<name>{current}</name>" in record.split("<parent>")[0]
            more = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if is_current else 0
            self.handle.snapshotCreateXML(record, flags | more)

    # --- asking ---------------------------------------------------------------------

    def xml(self) -> str:
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        return str(self.handle.XMLDesc(flags))

    def record(self, name: str) -> str:
        found = self.handle.snapshotLookupByName(name)
        return str(found.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE))

    def names(self) -> list[str]:
        return sorted(each.getName() for each in self.handle.listAllSnapshots(0))

    def current(self) -> str | None:
        if not self.handle.hasCurrentSnapshot(0):
            return None
        return str(self.handle.snapshotCurrent(0).getName())

    @staticmethod
    def source(xml: str, target: str) -> str:
        """The source of a disk in a <domain>, or in a snapshot's <domain>; by libvirt's words."""
        for part in xml.split("<disk ")[1:]:
            part = part.split("</disk>")[0]
            if f"<target dev='{target}'" in part:
                return part.split("<source file='")[1].split("'")[0]
        raise AssertionError(target)

    @staticmethod
    def overlay(xml: str, target: str) -> str:
        """The overlay of a disk in a snapshot's <disks>."""
        disks = xml.split("<disks>")[1].split("</disks>")[0]
        part = disks.split(f"<disk name='{target}'")[1].split("</disk>")[0]
        return part.split("<source file='")[1].split("'")[0]

    @staticmethod
    def read(path: Path) -> bytes:
        with path.open("rb") as file:
            fmt = "qcow2" if file.read(4) == b"QFI\xfb" else "raw"
        return raw_of(path, fmt)
