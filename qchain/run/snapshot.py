"""An external snapshot of a disk that nobody uses: a new overlay, in the field's two ways.

T1   live               ->  live <- NEW*          NEW is what the guest is to write to
T15  live               ->  NEW <- live*          the live image keeps its name

Stopped anywhere, the live name reads what it read. T15: after the hard link the image has two
names; the rename then puts the overlay, finished and durable, in the place of the old name.
Repeated with the same words, it goes on from there.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from qchain.chain.chain import Chain, open_chain
from qchain.chain.gate import Gate
from qchain.chain.scan import WORK_PREFIX, unfinished_of
from qchain.errors import FailedMidway, QchainError, Refused, UsageError
from qchain.plan.commands import create_empty_argv
from qchain.plan.refusals import stranger_refusals
from qchain.run.attributes import take_attributes
from qchain.run.durable import fsync_directory, fsync_file
from qchain.run.locking import ChainLocks, sole
from qchain.run.private import open_private
from qchain.run.qemu_img import QemuImg
from qchain.verify.compare import compare

__all__ = ["take_snapshot"]

_UNCHANGED = "nothing that the guest reads has changed; mend this and try again"


def take_snapshot(
    chain: Chain, new: Path, *, keep_active_name: bool = False, qemu: QemuImg | None = None
) -> Path:
    """Take a snapshot of the live image of `chain`; returns the image to be used from now on.

    Args:
        new: the overlay to be made; with `keep_active_name` the name that the present live
            image gets, beside it.

    Raises: `UsageError`, `Refused` before anything was changed (in use, `new` exists, another
        overlay backs on the live name, encrypted); `FailedMidway`.
    """
    live = chain.active
    path = Path(os.path.abspath(live.path))
    new = Path(os.path.abspath(new))
    _require_fit(chain, path, new, keep_active_name)
    files = [layer.file for layer in chain.layers]
    with sole(files, files[:1]), ChainLocks(chain.layers, chain.layers[:1]) as locks:
        below = new if keep_active_name else path
        overlay = path if keep_active_name else new
        name = below.name if below.parent == overlay.parent else str(below)
        draft = overlay.with_name(f"{WORK_PREFIX}{overlay.name[:200]}.new")
        linked = keep_active_name and not new.exists()
        if linked:
            os.link(path, new, follow_symlinks=False)
            fsync_directory(new.parent)
        draft.unlink(missing_ok=True)
        try:
            _create(draft, chain, name, qemu or QemuImg())
            take_attributes(path, draft)
            fsync_file(draft)
            _require_equal(chain, draft)
            if keep_active_name:
                locks.before_switch(live.file)
                draft.rename(overlay)
            else:
                # A name that came to be meanwhile is nobody's to be replaced.
                os.link(draft, overlay, follow_symlinks=False)
                draft.unlink()
            fsync_directory(overlay.parent)
        except (OSError, QchainError) as error:
            # As long as the live name is the same file, the other one is a spare name of it.
            if linked and path.samefile(new):
                new.unlink()
            if isinstance(error, Refused):
                raise
            if isinstance(error, QchainError):
                raise FailedMidway(error.what, error.why, _UNCHANGED) from None
            why = (error.strerror or str(error)).lower()
            raise FailedMidway(overlay, why, _UNCHANGED) from None
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
    return overlay


def _create(draft: Path, chain: Chain, backing: str, qemu: QemuImg) -> None:
    """By a descriptor: whoever owns the directory may swap the name for a link."""
    fd = open_private(draft)
    try:
        argv = create_empty_argv(draft, chain.size, backing, chain.active.format)
        argv[-2] = f"/proc/self/fd/{fd}"
        qemu.run(argv, cwd=draft.parent, pass_fds=(fd,))
    finally:
        os.close(fd)


def _require_fit(chain: Chain, path: Path, new: Path, keep_active_name: bool) -> None:
    live = chain.active
    for journal in unfinished_of(layer.path for layer in chain.layers):
        todo = f"'qchain recover {journal.parent}' first"
        raise Refused(journal, "a merge of this chain is not finished", todo)
    if path.is_symlink():
        raise Refused(path, "is a symbolic link", f"name {os.path.realpath(path)} itself")
    if not new.parent.is_dir():
        raise UsageError(new, "its directory does not exist", "make it first")
    if live.header is not None and live.header.encryption is not None:
        raise Refused(path, "is encrypted, and its overlay would not be", "use qemu-img by hand")
    repeated = keep_active_name and new.exists() and new.samefile(path)
    if os.path.lexists(new) and not repeated:
        raise Refused(new, "exists already", "choose another name")
    if not keep_active_name:
        return
    if live.file.is_block_device or new.parent != path.parent:
        raise Refused(
            new, "is not a name beside the live image, a file", "leave out --keep-active-name"
        )
    status = path.stat()
    if status.st_nlink > (2 if repeated else 1):
        raise Refused(path, "has other names (hard links)", "remove them first")
    own = {layer.file.id for layer in chain.layers}
    strangers = stranger_refusals({live.file.id: path}, own, [path.parent])
    if strangers:
        what, _, why = strangers[0].partition(": ")
        raise Refused(what, why.partition("; ")[0], "re-point it, or leave out --keep-active-name")


def _require_equal(chain: Chain, draft: Path) -> None:
    """An exit code is no evidence: the new overlay shows what the live image shows."""
    with open_chain(draft, Gate(follow=True), "qcow2") as made:
        found = compare(made.layers, chain.layers)
        if not found.identical or made.size != chain.size or len(made.layers) < 2:
            raise FailedMidway(
                draft, "the new overlay does not read as the live image", "nothing was switched"
            )
