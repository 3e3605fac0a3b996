"""The steps of the native engine performed: the right files, their locks, what may be repeated.

Clusters that a stop has leaked are found by qemu-img, before the step is done again or given
up: whoever has run meanwhile, only what nothing refers to is given free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qchain.errors import FailedMidway
from qchain.hostfile import HostFile
from qchain.native.clusters import last_counted
from qchain.native.free import free_old
from qchain.native.inplace import Place, append, header_of, switch
from qchain.native.newfile import write_new_file
from qchain.native.newheader import SECTOR
from qchain.plan.commands import check_leaks_argv, unlocked_argv
from qchain.plan.steps import NativeCopy, NativeFree, NativeSwitch, NativeWrite
from qchain.qcow2.check import check_image
from qchain.qcow2.header import read_header
from qchain.run.pending import Pending, read_pending, write_pending
from qchain.run.private import open_private

if TYPE_CHECKING:
    from qchain.run.group import GroupRun
    from qchain.run.journal import GroupRecord

__all__ = [
    "give_up_written",
    "native_copy",
    "native_free",
    "native_switch",
    "native_write",
    "switched_already",
]


def native_copy(run: GroupRun, step: NativeCopy) -> None:
    """Write the new file of a copy. Raises `QchainError` or `OSError`."""
    run.observer.step(step.label, step.weight)
    layers, count = run.old.layers, run.record.count
    fd = open_private(step.image)
    try:
        write_new_file(
            fd,
            step.image,
            layers[:count],
            layers[count:],
            (step.name, step.format),
            run.observer.advance,
        )
    finally:
        os.close(fd)


def native_write(run: GroupRun, step: NativeWrite) -> None:
    """Append the merged map; done again, after what was leaked is free.

    Raises: `QchainError` or `OSError`; the target reads as before then.
    """
    run.observer.step(step.label, step.weight)
    _reclaim(run, step.image, step.into)
    layers, count = run.old.layers, run.record.count
    place = Place(layers[:count], layers[count:], run.record.target)
    with _opened(run, step.image) as fd:
        known = Pending(os.fstat(fd).st_size, os.pread(fd, SECTOR, 0))
        write_pending(step.into, known)
        sector, _ = append(
            fd,
            step.image,
            place,
            (step.name, step.format),
            run.observer.advance,
        )
    write_pending(step.into, Pending(known.length, known.before, sector))


def native_switch(run: GroupRun, step: NativeSwitch) -> None:
    """Write the new header, unless it is there already."""
    pending = read_pending(step.source)
    with _opened(run, step.image) as fd:
        if pending.switched(os.pread(fd, SECTOR, 0)):
            os.fsync(fd)
            return
        # Read as it will be: what cannot be read must not come to be.
        header_of(step.image, pending.sector)
        switch(fd, step.image, pending.sector)


def native_free(run: GroupRun, step: NativeFree) -> None:
    """Free what only the old tables named; after a stop, what nothing names."""
    if run.resumed:
        _reclaim(run, step.image, step.source)
        return
    pending = read_pending(step.source)
    with _opened(run, step.image) as fd:
        free_old(fd, step.image, pending.before)


def give_up_written(run: GroupRun) -> None:
    """Free what was appended to the target, or what its old tables held, when the group ends."""
    for step in run.record.steps:
        if isinstance(step, NativeWrite):
            _reclaim(run, step.image, step.into)


def switched_already(record: GroupRecord) -> bool:
    """Whether the target's header leads to the new tables."""
    for step in record.steps:
        if isinstance(step, NativeWrite) and step.into.exists() and step.image.exists():
            with HostFile(step.image) as file:
                return file.id == record.goal.id and read_pending(step.into).switched(
                    file.pread(0, SECTOR)
                )
    return False


@contextmanager
def _opened(run: GroupRun, image: Path) -> Iterator[int]:
    """A descriptor to write to the target by, while we hold a writer's locks on it.

    Raises: `FailedMidway` when the name leads to another file.
    """
    with run.locks.handed_over((image,), (), image):
        fd = os.open(image, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            status, known = os.fstat(fd), run.record.goal.id
            if (status.st_dev, status.st_ino) != (known.device, known.inode):
                raise FailedMidway(image, "is another file than the one that is merged into")
            yield fd
        finally:
            os.close(fd)


def _reclaim(run: GroupRun, image: Path, kept: Path) -> None:
    """Free what is leaked in the target, and cut off what is unused at its end.

    Nothing is done where nothing was written yet.

    Raises: `QchainError`, `OSError`.
    """
    if not kept.exists() or not image.exists():
        return
    pending = read_pending(kept)
    with run.locks.handed_over((image,), (), image) as held:
        argv = check_leaks_argv(image)
        run.qemu.run(unlocked_argv(argv) if held else argv, pass_fds=held)
    run.flush(image)
    with _opened(run, image) as fd, HostFile(image) as file:
        header = read_header(file)
        found = check_image(file, header)
        if found.corruptions or found.leaks:
            return  # unused room at the end harms nothing
        used = last_counted(file, header)
        # The last cluster that it had may not have been whole.
        had = -(-pending.length // header.cluster_size)
        end = pending.length if used <= had else used * header.cluster_size
        if end < file.size:
            os.ftruncate(fd, end)
            os.fsync(fd)
