"""The images that are measured. All are made by qemu-img, but for those of metadata alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

from benchmarks.measure import QEMU_IMG

__all__ = ["copies", "filled", "layered", "overlays"]

_MIB = 1 << 20


def _qemu_img(*arguments: str | Path) -> None:
    subprocess.run([QEMU_IMG, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def _qemu_io(path: Path, script: str) -> None:
    argv = ["qemu-io", "-f", "qcow2", str(path)]
    subprocess.run(argv, input=script, text=True, check=True, stdout=subprocess.DEVNULL)


def _random_raw(path: Path, size: int, seed: int = 7) -> None:
    """Random bytes, with every eighth 16 MiB left a hole."""
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for start in range(0, size, 16 * _MIB):
            if start // (16 * _MIB) % 8 != 7:
                file.seek(start)
                file.write(generator.bytes(min(16 * _MIB, size - start)))


def copies(directory: Path, size: int) -> tuple[Path, Path]:
    """Two qcow2 images of the same `size` bytes of random data, sharing nothing."""
    raw, a, b = (directory / name for name in ("data.raw", "a.qcow2", "b.qcow2"))
    _random_raw(raw, size)
    _qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, a)
    raw.unlink()
    _qemu_img("convert", "-f", "qcow2", "-O", "qcow2", a, b)
    return a, b


def filled(path: Path, size: int) -> Path:
    """A qcow2 image of `size` bytes with data, the same in each 16 MiB; every eighth is a hole."""
    _qemu_img("create", "-q", "-f", "qcow2", path, str(size))
    script = "".join(
        f"write -q -P {1 + at // (16 * _MIB) % 250} {at} {min(16 * _MIB, size - at)}\n"
        for at in range(0, size, 16 * _MIB)
        if at // (16 * _MIB) % 8 != 7
    )
    _qemu_io(path, script)
    return path


def overlays(base: Path, size: int) -> tuple[Path, Path]:
    """Two overlays of `base` with the same data in 1 MiB of every 32."""
    made = []
    for name in ("left.qcow2", "right.qcow2"):
        path = base.with_name(name)
        _qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", path)
        script = "".join(
            f"write -P {1 + at // _MIB % 250} {at} {_MIB}\n" for at in range(0, size, 32 * _MIB)
        )
        _qemu_io(path, script)
        made.append(path)
    return made[0], made[1]


def layered(directory: Path, size: int, large: str) -> list[Path]:
    """base <- mid <- top, a disk of `size` bytes: `large` ("mid" or "top") holds most of it."""
    base = directory / "base.qcow2"
    _qemu_img("create", "-f", "qcow2", base, str(size))
    made = [base]
    for name in ("mid", "top"):
        path = directory / f"{name}.qcow2"
        _qemu_img("create", "-f", "qcow2", "-b", made[-1].name, "-F", "qcow2", path)
        made.append(path)
    for number, path in enumerate(made):
        length = 60 if path.stem == large else 4
        script = "".join(
            f"write -q -P {1 + (number * 80 + at // _MIB) % 250} {at} {length}M\n"
            for at in range(0, size - 64 * _MIB + 1, 64 * _MIB)
        )
        _qemu_io(path, script)
    return made
