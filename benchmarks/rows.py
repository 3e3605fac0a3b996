"""What is measured: groups of rows, each with its images in a directory of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.images import copies, filled, overlays
from benchmarks.measure import QCHAIN, QEMU_IMG, Sample, command, library, side_by_side
from benchmarks.merges import merges
from benchmarks.report import Row
from fixtures.bigmeta import build_big_chain

__all__ = ["GROUPS", "Group"]

_MIB, _GIB, _TIB = 1 << 20, 1 << 30, 1 << 40
PEAK = 100 * _MIB

Group = Callable[[Path, bool], Iterator[Row]]


def _size(size: int) -> str:
    unit, name = (_TIB, "TiB") if size >= _TIB else (_GIB, "GiB")
    return f"{size // unit} {name}"


def metadata(directory: Path, quick: bool) -> Iterator[Row]:
    """Four layers with 30, 10, 5 and 2 % at random: statistics, plan, map, memory."""
    size = 32 * _GIB if quick else _TIB
    active = str(build_big_chain(directory, size)[-1].path)
    label = _size(size)
    ours = side_by_side(
        {
            "read": library("read-tables", active),
            "statistics": library("statistics", active),
            "plan": library("plan", active),
            "both": library("both", active),
            "process": command(QCHAIN, "chain", "--json", active),
        },
        3 if quick else 7,
    )
    maps = side_by_side(
        {
            "qchain": command(QCHAIN, "map", "--json", active),
            "qemu": command(QEMU_IMG, "map", "-f", "qcow2", "--output=json", active),
        },
        1,
    )
    qemu = maps["qemu"]
    yield Row(f"{label}, statistics", ours["statistics"], qemu, 200)
    yield Row(f"{label}, plan", ours["plan"], qemu, 200)
    yield Row(f"{label}, statistics and plan", ours["both"], qemu)
    yield Row(f"{label}, 'chain --json'", ours["process"], qemu, 120)
    read = ours["read"]
    yield Row("statistics / reading L2 tables", ours["statistics"], read, -2)
    yield Row(f"{label}, 'map --json'", maps["qchain"], qemu, 5)
    for name in ("statistics", "plan", "process"):
        yield Row(f"peak memory, {name}", ours[name], None, PEAK, peak=True)
    yield Row("peak memory, map", maps["qchain"], maps["qemu"], None, peak=True)


def large(directory: Path, quick: bool) -> Iterator[Row]:
    """The same chain sixteen times as large: memory must not grow."""
    size = 64 * _GIB if quick else 16 * _TIB
    active = str(build_big_chain(directory, size)[-1].path)
    for name in ("statistics", "plan"):
        sample = library(name, active)()
        yield Row(f"{_size(size)}, {name}", sample)
        yield Row(f"peak memory, {_size(size)}, {name}", sample, None, PEAK, peak=True)


def depth(directory: Path, quick: bool) -> Iterator[Row]:
    """A very long chain of small layers."""
    layers = 100 if quick else 1000
    active = str(build_big_chain(directory, 4 * _GIB, fills=[0.005] * layers)[-1].path)
    found = side_by_side(
        {
            "qchain": command(QCHAIN, "chain", "--json", active),
            "map": command(QCHAIN, "map", "--json", active),
            "qemu": command(QEMU_IMG, "map", "-f", "qcow2", "--output=json", active),
        },
        1 if quick else 3,
    )
    qemu = found["qemu"]
    yield Row(f"{layers} layers, 'chain --json'", found["qchain"], qemu, 15)
    yield Row(f"{layers} layers, 'map --json'", found["map"], qemu)
    yield Row(f"peak memory, {layers} layers", found["qchain"], found["qemu"],
              None, peak=True)  # fmt: skip


def contents(directory: Path, quick: bool) -> Iterator[Row]:
    """Comparing, hashing and reading real data that lies in the page cache."""
    size = 256 * _MIB if quick else 5 * _GIB
    repeats = 3
    a, b = copies(directory, size)
    left, right = overlays(a, size)

    yield from _compare("compare, shared base", left, right, repeats, library_goal=10)
    yield from _compare("compare, unrelated", a, b, repeats, library_goal=2, command_goal=2)
    for path in (left, right, b):
        path.unlink()
    yield _hash(directory, a, repeats)
    if importlib.util.find_spec("dissect") is None:
        yield Row("sequential reading", None, None, 5, note="dissect.hypervisor is not installed")
    else:
        found = side_by_side({"us": library("read", a), "them": library("dissect", a)}, repeats)
        yield Row("sequential reading", found["us"], found["them"], 5,
                  note="against dissect.hypervisor")  # fmt: skip


def shared(directory: Path, quick: bool) -> Iterator[Row]:
    """Two clones of a template: so large a disk that start-up is a small part."""
    size = 256 * _MIB if quick else 14 * _GIB
    base = filled(directory / "template.qcow2", size)
    name = f"clones of {_size(size)}" if not quick else "clones"
    yield from _compare(name, *overlays(base, size), 3, library_goal=10, command_goal=10)


def _compare(
    name: str,
    x: Path,
    y: Path,
    repeats: int,
    library_goal: float,
    command_goal: float | None = None,
) -> Iterator[Row]:
    found = side_by_side(
        {
            "library": library("compare", x, y),
            "qchain": command(QCHAIN, "compare", x, y),
            "qemu": command(QEMU_IMG, "compare", "-f", "qcow2", "-F", "qcow2", x, y),
        },
        repeats,
    )
    yield Row(f"{name}, library", found["library"], found["qemu"], library_goal)
    yield Row(f"{name}, command", found["qchain"], found["qemu"], command_goal)


def _hash(directory: Path, image: Path, repeats: int) -> Row:
    raw = directory / "whole.raw"

    def convert_and_sum() -> Sample:
        raw.unlink(missing_ok=True)
        first = command(QEMU_IMG, "convert", "-f", "qcow2", "-O", "raw", image, raw)()
        return first + command("sha256sum", raw)()

    found = side_by_side(
        {"qchain": command(QCHAIN, "hash", image), "both": convert_and_sum}, repeats
    )
    said = subprocess.run([QCHAIN, "hash", str(image)], capture_output=True, text=True, check=True)
    with raw.open("rb") as file:
        same = said.stdout.split()[0] == hashlib.file_digest(file, "sha256").hexdigest()
    raw.unlink()
    note = "" if same else "the digests DIFFER"
    return Row("hash / convert and sha256sum", found["qchain"], found["both"], 6,
               note=note)  # fmt: skip


def startup(directory: Path, quick: bool) -> Iterator[Row]:
    """What a small command costs, against importing what it is built on."""
    image = directory / "small.qcow2"
    subprocess.run([QEMU_IMG, "create", "-q", "-f", "qcow2", str(image), "64M"], check=True)
    found = side_by_side(
        {
            "import": command(sys.executable, "-c", "import typer, numpy, construct"),
            "help": command(QCHAIN, "--help"),
            "info": command(QCHAIN, "info", image),
        },
        5 if quick else 15,
    )
    peer = found["import"]
    yield Row("'qchain --help' / imports", found["help"], peer, -1)
    yield Row("'qchain info' / imports", found["info"], peer, -1.5)


@dataclass(frozen=True)
class Named:
    """A group and the word that selects it on the command line."""

    name: str
    rows: Group


GROUPS = tuple(
    Named(group.__name__, group)
    for group in (startup, contents, shared, merges, depth, metadata, large)
)
