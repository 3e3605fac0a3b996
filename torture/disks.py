"""A small file system of its own on a loop device: it can lose power, and be filled.

Power is lost by the ioctl that `xfs_io -x -c shutdown` uses too: nothing more reaches the device,
the log is not flushed, and what was only in memory is gone with the next mount.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["KINDS", "LoopDisk"]

KINDS = ("xfs", "ext4")
_SIZES = {"xfs": 320 << 20, "ext4": 64 << 20}
"""Bytes. mkfs.xfs makes none below 300 MB."""

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN, _IOR('X', 125, __u32)
_NOLOGFLUSH = 2


class LoopDisk:
    """A file system of `kind` in a sparse file in `scratch`, mounted at `mount` while entered."""

    def __init__(self, kind: str, scratch: Path, size: int | None = None) -> None:
        self.kind = kind
        self.device, self.mount = scratch / f"{kind}.disk", scratch / kind
        self.size = size or _SIZES[kind]

    def __enter__(self) -> LoopDisk:
        self.mount.mkdir(exist_ok=True)
        self.device.unlink(missing_ok=True)
        with self.device.open("wb") as file:
            file.truncate(self.size)
        quiet = ["-q", "-f"] if self.kind == "xfs" else ["-q", "-F", "-m", "0"]
        _run([f"mkfs.{self.kind}", *quiet, str(self.device)])
        self._mount()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):
            self._unmount()
        self.device.unlink(missing_ok=True)

    def flush(self) -> None:
        """What is there is durable; from here on only what a merge flushes itself is."""
        _run(["sync", "-f", str(self.mount)])

    def cut(self) -> None:
        """The power fails now."""
        fd = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NOLOGFLUSH))
        finally:
            os.close(fd)

    def again(self) -> None:
        """The machine is up again: mounted anew, the log replayed."""
        self._unmount()
        if _run(["losetup", "-j", str(self.device)]):
            # In another mount namespace, of some sandbox, the dead one is mounted still.
            aside = self.device.with_suffix(".again")
            _run(["cp", "--sparse=always", str(self.device), str(aside)])
            aside.replace(self.device)
        self._mount()

    def free(self) -> int:
        """Bytes that another writer could take."""
        status = os.statvfs(self.mount)
        return status.f_bavail * status.f_frsize

    def _mount(self) -> None:
        options = "loop,nouuid" if self.kind == "xfs" else "loop"
        _run(["mount", "-o", options, str(self.device), str(self.mount)])

    def _unmount(self) -> None:
        # Who was killed a moment ago may still be on its way out.
        for _ in range(100):
            try:
                _run(["umount", str(self.mount)])
            except RuntimeError as error:
                last = error
                time.sleep(0.02)
            else:
                return
        raise last


def _run(argv: Sequence[str]) -> str:
    """What the program prints. Raises `RuntimeError` when it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout
