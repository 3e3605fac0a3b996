"""That all this bites: a plain `qemu-img rebase`, killed in the same way, loses data."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fixtures.build import build_chain
from fixtures.shadow import shadow_points
from torture.process import THEIRS, calls_in

__all__ = ["plain_rebase_loses"]

LINES = ("[raw] 1M:A", "128k:- 256k:B 128k:- 64k:0 64k:B", "[size=1088k] 192k:- 64k:C")


def plain_rebase_loses(directory: Path, cut: Callable[[], None] | None = None) -> list[str]:
    """The spots (call, number) at which a plain rebase, killed there, loses data.

    `cut`: what happens then, a loss of power; `directory` is on that file system. The window is
    short, and which thread comes first is left to chance: up to six rounds, until one finds it.
    """
    old = shadow_points(LINES)[-1]
    lost: list[str] = []
    for _ in range(6):
        lost = lost or _one_round(directory, cut, old)
    return lost


def _one_round(directory: Path, cut: Callable[[], None] | None, old: bytes) -> list[str]:
    counts = _count(directory)
    assert counts["pwrite64"] and counts["fdatasync"], counts
    lost = []
    for call, most in sorted(counts.items()):
        for nth in range(1, most + 1):
            _rebase(_built(directory), f"inject={call}:signal=KILL:when={nth}", call)
            if cut is not None:
                cut()
            raw = directory.with_suffix(".raw")
            top = directory / "images" / "l2.qcow2"
            done = subprocess.run(
                ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, raw], capture_output=True
            )
            if done.returncode or raw.read_bytes() != old:
                lost.append(f"{call} {nth}")
    return lost


def _built(directory: Path) -> Path:
    images = directory / "images"
    shutil.rmtree(images, ignore_errors=True)
    build_chain(images, LINES)
    subprocess.run(["sync", "-f", images], check=True)
    return images


def _rebase(images: Path, inject: str, call: str, log: Path | None = None) -> None:
    trace = ["strace", "-f", "-o", log or "/dev/null", "-e", f"trace={call}", "-e", inject]
    plain = ["qemu-img", "rebase", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "l2.qcow2"]
    subprocess.run([*trace, *plain], cwd=images, capture_output=True, check=False)


def _count(directory: Path) -> Counter[str]:
    """How often its busiest thread makes each call, in a rebase that nobody disturbs."""
    log = directory.with_suffix(".calls")
    _rebase(_built(directory), "signal=none", THEIRS, log)
    return calls_in(log)
