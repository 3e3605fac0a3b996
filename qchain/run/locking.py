"""qemu's locks over a whole chain, held through a merge and handed to qemu-img step by step."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qchain.chain.layer import Layer
from qchain.chain.scan import identity
from qchain.errors import Refused
from qchain.hostfile import HostFile
from qchain.run.locks import (
    flock_holder,
    hold_reader,
    hold_writer,
    holder_name,
    keep_unshared,
    probe,
    release,
    step_down,
)

__all__ = ["ChainLocks", "sole"]


class ChainLocks:
    """A reader's locks on every layer: nobody else may open one for writing.

    Those that are `merged`, the active ones among them, nobody else may even read: qemu-img
    could not write to them, and who reads one would see its content change.

    Raises `Refused` on entry when an image is in use, by whom if that can be known;
    nothing was changed then.
    """

    def __init__(self, layers: Sequence[Layer], merged: Sequence[Layer] = ()) -> None:
        self.layers = list(layers)
        self._alone = list(merged)

    def __enter__(self) -> ChainLocks:
        try:
            for layer in self.layers:
                state = probe(layer.file.fd)
                alone = any(layer is each for each in self._alone)
                if state.writer or (state.in_use and alone):
                    who = holder_name(layer.file.fd) or "another process"
                    raise Refused(
                        layer.path, f"is in use by {who}", "shut the guest off and try again"
                    )
                if state.known:
                    hold_reader(layer.file.fd)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def join(self, layer: Layer) -> None:
        """Hold a new file too. Raises `Refused` when somebody has it already."""
        if probe(layer.file.fd).known:
            hold_reader(layer.file.fd)
        self.layers.append(layer)

    def _release(self) -> None:
        for layer in self.layers:
            if layer.file.fd >= 0 and probe(layer.file.fd).known:
                release(layer.file.fd)

    @contextmanager
    def handed_over(
        self, writes: Iterable[Path], between: Iterable[Layer], named: Path | None = None
    ) -> Iterator[tuple[int, ...]]:
        """Let qemu-img write to `writes`, and pass the layers `between` (commit).

        `named`, one of `writes`, is not released: we hold a writer's locks on it, for
        qemu-img, from before it begins until after it has ended. It must take none itself
        (`unlocked_argv`), and gets the descriptors given here: so the locks last as long
        as it does, even if we are killed. None are given where there are no locks.

        Raises `Refused` on leaving when somebody got hold of what was released.
        """
        kept: list[Layer] = []
        given = [layer for layer in self.layers if _is_any(layer, writes) and _has_locks(layer)]
        if named is not None:
            kept = [layer for layer in given if _is_any(layer, [named])]
            given = [layer for layer in given if layer not in kept]
        passed = [layer for layer in between if _has_locks(layer)]
        for layer in kept:
            hold_writer(layer.file.fd)
        for layer in passed:
            keep_unshared(layer.file.fd)
        for layer in given:
            release(layer.file.fd)
        try:
            yield tuple(layer.file.fd for layer in kept)
        finally:
            for layer in kept:
                step_down(layer.file.fd)
            for layer in (*given, *passed):
                hold_reader(layer.file.fd)

    def before_switch(self, kept: HostFile) -> None:
        """Nobody may have the kept image open when its name goes to another file."""
        if probe(kept.fd).known:
            hold_writer(kept.fd)


@contextmanager
def sole(files: Iterable[HostFile], merged: Iterable[HostFile]) -> Iterator[None]:
    """Be the only qchain that changes these `files` of a chain (flock, which qemu ignores).

    Those that are `merged` are nobody else's; the others, which may be part of other
    chains as well, may be shared. Every file is held, not one name: a merge gives the
    name of one to another, and none of them may be without its lock then. The locks
    belong to the open files and end with them; here they are given up at the end.

    Raises `Refused` when another one is at it.
    """
    alone = {file.id for file in merged}
    held: list[HostFile] = []
    try:
        for file in files:
            kind = fcntl.LOCK_EX if file.id in alone else fcntl.LOCK_SH
            try:
                fcntl.flock(file.fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                who = flock_holder(file.fd)
                raise Refused(
                    file.path,
                    "another qchain is working on this chain" + f": {who}" * (who is not None),
                    "wait until it has ended",
                ) from None
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise Refused(
                    file.path, f"cannot be locked: {reason}", "use a file system that has locks"
                ) from None
            held.append(file)
        yield
    finally:
        for file in held:
            if file.fd >= 0:
                fcntl.flock(file.fd, fcntl.LOCK_UN)


def _has_locks(layer: Layer) -> bool:
    return probe(layer.file.fd).known


def _is_any(layer: Layer, names: Iterable[Path]) -> bool:
    return any(identity(name) == layer.file.id for name in names)
