"""A point copied into a new file, as virsh's blockcopy does it, offline.

base <- a <- active        DEST alone (all of it), or base <- DEST (shallow, over a base)

Nothing of the chain changes. The new file is made under a name of its own, compared, and only
then gets its name, which must be free: stopped anywhere, DEST is not there or is right.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from qchain.chain.chain import Chain
from qchain.chain.layer import Layer, Qcow2Layer, RawLayer
from qchain.chain.ownership import ownership
from qchain.chain.scan import WORK_PREFIX, unfinished_of
from qchain.errors import FailedMidway, QchainError, Refused, UsageError
from qchain.hostfile import HostFile
from qchain.plan.copying import copy_argvs
from qchain.plan.names import backing_name
from qchain.plan.naming import new_room, room
from qchain.plan.options import AUTO_ENGINES
from qchain.qcow2.header import read_header
from qchain.run.attributes import take_attributes
from qchain.run.durable import fsync_directory, fsync_open
from qchain.run.execute import Silent
from qchain.run.group import Observer
from qchain.run.locking import ChainLocks
from qchain.run.private import open_private
from qchain.run.qemu_img import QemuImg
from qchain.run.whole import Whole
from qchain.verify.compare import Comparison, compare
from qchain.verify.shared import SharedExtents

__all__ = ["Copy", "copy_point", "planned_copy"]

_UNCHANGED = "the chain is unchanged and nothing is left of the copy; mend this and try again"


@dataclass(frozen=True)
class Copy:
    """What is to be done.

    Attributes:
        base: index of the layer that the copy backs on; None: it stands alone.
        backing: that layer's name as the copy's header will have it.
        most: the bytes that the new file takes at most, its tables left out.
        native: written by qchain itself, not by qemu-img.
    """

    chain: Chain
    destination: Path
    base: int | None
    backing: str | None
    most: int
    native: bool = False

    @property
    def base_format(self) -> str | None:
        return None if self.base is None else self.chain.layers[self.base].format

    def commands(self, out: Path | None = None) -> list[list[str]]:
        """qemu-img's command lines; `out`: the file instead of the destination."""
        if self.native:
            return []
        layers, base = self.chain.layers, self.base
        return copy_argvs(
            layers[0],
            layers[1] if len(layers) > 1 else None,
            None if base is None else layers[base],
            out or self.destination,
            self.backing,
        )


def planned_copy(
    chain: Chain, destination: Path, base: int | None, engine: str = AUTO_ENGINES[0]
) -> Copy:
    """What a copy of the active point of `chain` to `destination` takes.

    Args:
        base: index of the layer to back on; None for a full copy.
        engine: "qemu-img" or "native".

    Raises: `UsageError`, `Refused`: the name is taken, too little space, an image that
        cannot be copied.
    """
    active = chain.active
    destination = Path(os.path.abspath(destination))
    if base == 0:
        raise UsageError(active.path, "cannot be its own base", "name an image below it")
    if not destination.parent.is_dir():
        raise UsageError(destination, "its directory does not exist", "make it first")
    if os.path.lexists(destination):
        raise Refused(destination, "exists already", "choose another name")
    for journal in unfinished_of(layer.path for layer in chain.layers):
        todo = f"'qchain recover {journal.parent}' first"
        raise Refused(journal, "a merge of this chain is not finished", todo)
    for layer in chain.layers:
        if layer.header is not None and layer.header.encryption is not None:
            why = "is encrypted, and its copy would not be"
            raise Refused(layer.path, why, "use qemu-img by hand")
        if layer.header is not None and layer.header.has_data_file:
            raise Refused(layer.path, "has an external data file", "use qemu-img by hand")
    native = engine == "native"
    if native and active.format != "qcow2":
        why = f"is {active.format}, and the native engine writes qcow2"
        raise Refused(active.path, why, "leave out --engine")
    backing = None
    if base is not None:
        overlay, below = chain.layers[base - 1 : base + 1]
        backing = backing_name(overlay, below, destination.parent)
    header = active.header
    most_room = 0 if header is None else new_room(header) if native else room(header)
    if header is not None and backing is not None and len(os.fsencode(backing)) > most_room:
        raise Refused(
            destination, "its header has no room for the backing name", "use a shorter one"
        )
    most = sum(each.owned for each in ownership(chain.layers)[:base])
    place = os.statvfs(destination.parent)
    free = place.f_bavail * place.f_frsize
    if most > free:
        raise Refused(
            destination, f"the copy needs up to {most} bytes there and {free} are free", "make room"
        )
    return Copy(chain, destination, base, backing, most, native)


def copy_point(
    wanted: Copy, qemu: QemuImg | None = None, observer: Observer | None = None
) -> Comparison:
    """Make the copy, prove that it reads as the point does, give it its name.

    The copy may be read and written by those who may do so with the active image.

    Returns: the comparison.
    Raises: `Refused` (in use); `FailedMidway`, `KeyboardInterrupt`: nothing is left then.
    """
    qemu, observer = qemu or QemuImg(), observer or Silent()
    destination, active = wanted.destination, wanted.chain.active
    draft = destination.with_name(f"{WORK_PREFIX}{secrets.token_hex(8)}.copy")
    with ChainLocks(wanted.chain.layers):
        try:
            # By a descriptor: whoever owns the directory may swap the name for a link.
            fd = open_private(draft)
            try:
                found = _made(wanted, fd, draft, qemu, observer)
                # Of the file that the name leads to: it may be a link.
                take_attributes(Path(os.path.realpath(active.path)), draft)
                fsync_open(fd, draft)
                if not os.path.samestat(os.fstat(fd), os.lstat(draft)):
                    raise FailedMidway(draft, "is another file than the one that was made")
                # A name that came to be meanwhile is nobody's to be replaced.
                os.link(draft, destination, follow_symlinks=False)
            finally:
                os.close(fd)
            draft.unlink()
            fsync_directory(destination.parent)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise FailedMidway(destination, why, _UNCHANGED) from None
        except Refused:
            raise
        except QchainError as error:
            raise FailedMidway(error.what, error.why, _UNCHANGED) from None
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
    return found


def _made(wanted: Copy, fd: int, draft: Path, qemu: QemuImg, observer: Observer) -> Comparison:
    """Fill the file open at `fd`, named `draft`, and compare it with the point."""
    argvs = wanted.commands(Path(f"/proc/self/fd/{fd}"))
    moving = [argv for argv in argvs if "-u" not in argv]
    observer = Whole(observer, wanted.most * max(1, len(moving)) + wanted.chain.size)
    if wanted.native:
        _write(wanted, fd, draft, observer)
    for argv in argvs:
        moves = argv in moving
        observer.step(f"copy {wanted.chain.active.path.name}", wanted.most if moves else 0)
        qemu.run(
            argv,
            progress=lambda part: observer.advance(int(part * wanted.most), wanted.most),
            pass_fds=(fd,),
        )
    fsync_open(fd, draft)
    observer.step("verify", wanted.chain.size)
    with HostFile(draft) as file:
        if not os.path.samestat(os.fstat(fd), os.fstat(file.fd)):
            raise FailedMidway(draft, "is another file than the one that was made")
        layer = _layer(wanted, draft, file)
        below = () if wanted.base is None else wanted.chain.layers[wanted.base :]
        found = compare(
            [layer, *below],
            wanted.chain.layers,
            extents=SharedExtents() if wanted.native else None,
            progress=observer.advance,
        )
    if not found.identical or layer.size != wanted.chain.size:
        raise FailedMidway(draft, f"the copy differs at guest offset {found.first_difference}", "")
    return found


def _write(wanted: Copy, fd: int, draft: Path, observer: Observer) -> None:
    """By the native engine."""
    # Imported late: qemu-img is the usual engine.
    from qchain.native.newfile import write_new_file

    layers, base = wanted.chain.layers, wanted.base
    observer.step(f"copy {wanted.chain.active.path.name}", wanted.most)
    write_new_file(
        fd,
        draft,
        layers if base is None else layers[:base],
        () if base is None else layers[base:],
        (wanted.backing, wanted.base_format),
        observer.advance,
    )


def _layer(wanted: Copy, draft: Path, file: HostFile) -> Layer:
    """The new file as a layer; an exit code is no evidence of what its header says."""
    if wanted.chain.active.format == "raw":
        return RawLayer(draft, file)
    header = read_header(file)
    header.require_readable(draft)
    if (header.backing_name, header.backing_format) != (wanted.backing, wanted.base_format):
        raise FailedMidway(draft, f"its header names {header.backing_name!r} as backing file")
    return Qcow2Layer(draft, file, header)
