"""The steps of the native engine performed: the right files, their locks, progress."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qchain.native.newfile import write_new_file
from qchain.plan.steps import NativeCopy
from qchain.run.private import open_private

if TYPE_CHECKING:
    from qchain.run.group import GroupRun

__all__ = ["native_copy"]


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
            lambda done, total: run.observer.advance(
                step.weight * done // max(1, total), step.weight
            ),
        )
    finally:
        os.close(fd)
