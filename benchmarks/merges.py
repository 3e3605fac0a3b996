"""Whole merges by the native engine, against the bare command of qemu-img, on three filesystems.

XFS and btrfs lie in files, mounted by loop devices; the third is the one of the images'
directory. Each run merges a chain of its own, copied and flushed beforehand.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.images import layered
from benchmarks.measure import QCHAIN, QEMU_IMG, Runner, Sample, command, side_by_side
from benchmarks.report import Row

__all__ = ["merges"]

_GIB = 1 << 30
_SHARED = 20.0
_COPIED = {"pull": 2.0, "commit": 2.0, "copy": 1.2}


def merges(directory: Path, quick: bool) -> Iterator[Row]:
    """Pull and commit of one dropped image, and a copy of all; with the limits set by cp."""
    size = _GIB // 4 if quick else 3 * _GIB
    own = size if quick else _GIB
    for kind in ("xfs", "btrfs"):
        with _mounted(directory, kind, 3 * size + _GIB) as place:
            if place is None:
                yield Row(f"{kind}: not measured", None, note="cannot be made or mounted here")
                continue
            yield from _on(kind, place, size, quick, shares=True)
    place = directory / "own"
    place.mkdir()
    yield from _on("own filesystem", place, own, quick, shares=False)


def _on(kind: str, place: Path, size: int, quick: bool, *, shares: bool) -> Iterator[Row]:
    made = place / "made"
    repeats = 1 if quick else 3
    for way in ("pull", "commit", "copy"):
        made.mkdir()
        layered(made, size, "top" if way == "commit" else "mid")
        os.sync()
        found = side_by_side(
            {
                "native": _prepared(made, place / "a", way, shares, *_ours(way)),
                "qemu": _prepared(made, place / "b", way, shares, *_bare(way)),
            },
            repeats,
        )
        goal = _SHARED if shares else _COPIED[way]
        yield Row(f"{kind}, {way}", found["native"], found["qemu"], goal)
        if way == "copy":
            how = "always" if shares else "never"
            words = ["cp", f"--reflink={how}", "base.qcow2", "mid.qcow2", "top.qcow2", "copies"]
            limit = _prepared(made, place / "c", way, shares, words, ["sync", "-f", "copies"])()
            yield Row(f"{kind}, copy / cp --reflink={how}", found["native"], limit)
        shutil.rmtree(made)


def _ours(way: str) -> list[list[str]]:
    request = ["--flatten"] if way == "copy" else ["--drop", "mid.qcow2"]
    words = [QCHAIN, "merge", "top.qcow2", *request, "--strategy", way, "--engine", "native"]
    return [[*words, "--yes", "--keep-files"]]


def _bare(way: str) -> list[list[str]]:
    """Flushed too, for a merge that the next power cut takes back is none."""
    if way == "pull":
        words = ["rebase", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]
        return [[QEMU_IMG, *words], ["sync", "top.qcow2"]]
    if way == "commit":
        words = ["commit", "-d", "-f", "qcow2", "-b", "mid.qcow2", "top.qcow2"]
        return [[QEMU_IMG, *words], ["sync", "mid.qcow2"]]
    words = ["convert", "-f", "qcow2", "-O", "qcow2", "top.qcow2", "new.qcow2"]
    return [[QEMU_IMG, *words], ["sync", "new.qcow2"]]


def _prepared(made: Path, place: Path, way: str, shares: bool, *commands: list[str]) -> Runner:
    """Runs the commands in a fresh copy of the chain, whose making is not timed.

    What is written to has its own blocks, the others may share theirs with the originals.
    """
    target = {"pull": "top", "commit": "mid"}.get(way)

    def run() -> Sample:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "copies").mkdir()
        for path in made.iterdir():
            how = "always" if shares and path.stem != target else "never"
            subprocess.run(["cp", f"--reflink={how}", path, place], check=True)
        os.sync()
        spent = Sample(0, 0)
        for words in commands:
            spent += command("env", "-C", place, *words)()
        shutil.rmtree(place)
        return spent

    return run


@contextlib.contextmanager
def _mounted(directory: Path, kind: str, size: int) -> Iterator[Path | None]:
    """A fresh filesystem of this kind; None where that is not possible."""
    image, place = directory / f"{kind}.img", directory / kind
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    try:
        subprocess.run([f"mkfs.{kind}", "-q", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        image.unlink()
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        image.unlink()
