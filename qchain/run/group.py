"""One group while it is merged: each step performed so that it may be repeated.

Crash states: `qchain.plan.sequence` says what the guest reads after each step.
A step that was done already, or in part, by a process that was killed is done again
with the same outcome.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.chain.scan import identity
from qchain.errors import FailedMidway, Refused
from qchain.hostfile import HostFile
from qchain.plan.commands import unlocked_argv
from qchain.plan.steps import (
    Adopt,
    Command,
    Compare,
    Confirm,
    ConfirmBitmaps,
    Freeze,
    HardLink,
    MakeDirectory,
    NativeCopy,
    NativeFree,
    NativeSwitch,
    NativeWrite,
    RemoveDirectory,
    Rename,
    Step,
    SymbolicLink,
    Sync,
    TakeAttributes,
    TakeManifest,
    Unlink,
    written_by,
)
from qchain.qcow2.header import read_header
from qchain.run.attributes import open_to_all_of, take_attributes
from qchain.run.bitmaps import as_it_is, confirm_bitmaps
from qchain.run.confirm import confirm, require_same_size
from qchain.run.cut_short import cut_again
from qchain.run.durable import fsync_directory, fsync_file, fsync_open
from qchain.run.goback import created, led_away, restore_backing
from qchain.run.journal import GroupRecord, Journal, LayerRecord
from qchain.run.locking import ChainLocks
from qchain.run.oldview import OldView, rescued_beside
from qchain.run.pending import pending_files
from qchain.run.private import make_private, open_private
from qchain.run.qemu_img import QemuImg
from qchain.run.room import Room
from qchain.run.steady import Steady
from qchain.verify.frozen import map_digest

__all__ = ["GroupRun", "Observer"]


class Observer(Protocol):
    """Who wants to see how it goes on. All amounts in bytes."""

    def step(self, label: str, total: int, done: int = 0) -> None:
        """A step begins: of `total` expected bytes `done` are (total 0: it is short)."""

    def advance(self, done: int, total: int) -> None:
        """How far the present step is."""


class GroupRun:
    """One group while it is merged: its old view, and how to put it back."""

    def __init__(
        self,
        record: GroupRecord,
        layers: Sequence[Layer],
        verify: str,
        qemu: QemuImg,
        observer: Observer,
        locks: ChainLocks,
    ) -> None:
        """`layers`: the open files of `record.layers`, the kept image first; none where
        only steps are left that change names. `locks` hold all files that there are."""
        self.record, self.verify = record, verify
        self.qemu, self.observer, self.locks = qemu, observer, locks
        self.t_path = record.goal.path
        self.old = OldView(record, layers)
        self.steady = Steady(locks.layers)
        needed = max((step.room for step in record.steps if isinstance(step, Command)), default=0)
        self.room = Room(self.t_path, needed) if needed else None
        self.opened: list[HostFile] = []
        self.journal: Journal | None = None
        self.made: list[Path] = []
        self.links: list[tuple[Path, Path]] = []
        self.names = {known.path for known in record.layers}
        self.switched = False
        self.resumed = False

    def perform(self, step: Step) -> None:
        """Do one step. Raises `QchainError` or `OSError` when it fails."""
        named = [] if self.switched or self.resumed else self.record.layers
        self.steady.require(self.locks.layers, named)
        try:
            self._do(step)
        finally:
            written = {identity(path) for path in written_by(step)}
            if written or isinstance(step, Adopt):
                self.steady.note(self.locks.layers, written)

    def _do(self, step: Step) -> None:
        match step:
            case Command():
                self._command(step)
            case NativeCopy() | NativeWrite() | NativeSwitch() | NativeFree():
                self._native(step)
            case Adopt(image):
                self._adopt(image)
            case Freeze(_, into):
                self.made += [into, rescued_beside(into)]
                self.old.freeze(into)
            case TakeManifest(_, into):
                self.made.append(into)
                self.observer.step("digest", step.weight)
                self.old.take_manifest(into, self.observer.advance)
                fsync_directory(into.parent)
            case Compare():
                self.observer.step("verify", step.weight)
                full = self.verify == "full"
                self.old.compare(step, full, self.observer.advance, self.resumed)
            case Confirm(image, backing, fmt, final):
                confirm(image, backing, fmt, final, self.switched)
            case ConfirmBitmaps():
                confirm_bitmaps(step, self.record.steps)
            case MakeDirectory(path):
                make_private(path)
                self.made.append(path)
            case RemoveDirectory(path):
                with contextlib.suppress(FileNotFoundError):
                    path.rmdir()
            case HardLink(existing, link):
                if not (os.path.lexists(link) and os.path.samestat(link.lstat(), existing.stat())):
                    os.link(existing, link, follow_symlinks=False)
                self.note_link(existing, link)
            case SymbolicLink(target, link):
                if not (link.is_symlink() and link.readlink() == target):
                    link.symlink_to(target)
                self.note(link)
            case TakeAttributes(source, target):
                if target not in self.names and target != self.t_path:
                    open_to_all_of(source, target)
                elif source.exists() and target.exists() and not source.samefile(target):
                    take_attributes(source, target)
            case Sync(path):
                self._sync(path)
            case Rename(old, new):
                self._rename(old, new)
            case Unlink(path) if path in self.names:
                self._unlink(path)
            case Unlink(path):
                path.unlink(missing_ok=True)

    # --- the steps -----------------------------------------------------------------

    def _native(self, step: NativeCopy | NativeWrite | NativeSwitch | NativeFree) -> None:
        # Imported late: qemu-img is the usual engine.
        from qchain.run.native import native_copy, native_free, native_switch, native_write

        match step:
            case NativeCopy(image):
                self.made.append(image)
                native_copy(self, step)
            case NativeWrite(_, into):
                self.made += pending_files(into)
                native_write(self, step)
            case NativeSwitch():
                native_switch(self, step)
            case NativeFree():
                native_free(self, step)

    def note(self, path: Path) -> None:
        """Work files of ours are removed when the group is put back."""
        if path.parent in self.made:
            self.made.append(path)

    def note_link(self, existing: Path, link: Path) -> None:
        """A further name that we gave; it goes again when the group is put back."""
        if link.parent in self.made:
            self.made.append(link)
        else:
            self.links.append((existing, link))

    def _held(self, path: Path) -> HostFile | None:
        """The file that `path` names now, which we have open; None where it names nothing.

        Names are not enough to rename and to delete by. Raises `Refused` when it is a
        file that we do not know.
        """
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return None
        for layer in self.locks.layers:
            if os.path.samestat(status, os.fstat(layer.file.fd)):
                return layer.file
        raise Refused(
            path, "is another file than the one that the merge knows", "put it under another name"
        )

    def _expected(self, path: Path, known: LayerRecord) -> HostFile | None:
        file = self._held(path)
        if file is not None and file.id != known.id:
            raise Refused(
                path, f"is not the file that was {known.path.name}", "put it under another name"
            )
        return file

    def _sync(self, path: Path) -> None:
        if path.is_dir():
            fsync_directory(path)
        elif path.exists() or not self.switched:
            # A repeated step may come after the file got its other name.
            self.flush(path)

    def flush(self, path: Path) -> None:
        """Through the descriptor that we had before qemu-img wrote, if there is one."""
        for layer in self.locks.layers:
            if _is_file(path, layer.file):
                fsync_open(layer.file.fd, path)
                return
        fsync_file(path)

    def _rename(self, old: Path, new: Path) -> None:
        target = self.record.goal
        if self._expected(old, target) is None:
            if not self._is_target(new):
                raise FailedMidway(old, "is missing")
            return  # it was done before
        self._require_same_size()
        over = next(known for known in self.record.layers if known.path == new)
        for known in (over, self.record.layers[0]):
            # Nobody may have open what is replaced, nor what backed on it.
            file = self._expected(known.path, known)
            if file is not None:
                self.locks.before_switch(file)
        self.switched = True
        old.rename(new)

    def _require_same_size(self) -> None:
        require_same_size(self.locks.layers, self.record.layers[0].id, self.record.goal.id)

    def _unlink(self, path: Path) -> None:
        """Delete an image, if the name is still that of the file that was dropped."""
        known = next(known for known in self.record.layers if known.path == path)
        file = self._expected(path, known)
        if file is not None:
            if known is self.record.layers[0]:
                self._require_same_size()
            self.locks.before_switch(file)
            self.switched = True
            path.unlink()
        self.switched = True

    def _command(self, step: Command) -> None:
        self.observer.step(step.label, step.weight)
        verb = step.argv[0]
        self.switched = self.switched or self.repoints_above(step)
        if verb == "create":
            self._create(step)
            return
        if verb == "convert":
            self.made.append(self.t_path)
        if verb == "rebase" and "-u" not in step.argv:
            self._before_pull()
        if verb == "bitmap":
            possible = as_it_is(step)
            if possible is None:
                return  # it was done before
            step = possible
        above = self.record.layers[: self.record.target]
        passed = {known.id for known in above if known.path not in step.writes}
        between = [layer for layer in self.locks.layers if layer.file.id in passed]
        named = step.writes[-1]
        # Neither a commit that keeps its top nor a change of names touches the map of it.
        stays = step.commits or (verb == "rebase" and "-u" in step.argv)
        before = map_digest(named) if stays else None
        watch = None
        if self.room is not None and step.room and not self.resumed:
            # Once stopped, what it has grown by is not known: then only qemu-img tells.
            watch = self.room.require
            watch()
        passing = between if step.commits else ()
        with self.locks.handed_over(step.writes, passing, named) as held:
            self.qemu.run(
                unlocked_argv(step.argv) if held else step.argv,
                progress=lambda part: self.observer.advance(int(part * step.weight), step.weight),
                cwd=step.cwd,
                pass_fds=held or self._of_kept(),
                watch=watch,
            )
        if verb == "resize" and self.record.goal.format == "qcow2":
            cut_again(named, int(step.argv[-1]), self.resize)
        if before is not None and map_digest(named) != before:
            raise FailedMidway(
                named, f"its map or length changed while 'qemu-img {verb}' ran, which must not be"
            )

    def resize(self, argv: list[str]) -> None:
        """Have qemu-img resize the target."""
        with self.locks.handed_over((self.t_path,), (), self.t_path) as held:
            self.qemu.run(unlocked_argv(argv) if held else argv, pass_fds=held)

    def _of_kept(self) -> tuple[int, ...]:
        """The kept image's descriptor, for a qemu-img that writes to the new file of a copy.

        Should we be killed it goes on, and the locks that it so has keep a recovery away.
        """
        kept = self.record.layers[0].id
        return tuple(each.file.fd for each in self.locks.layers if each.file.id == kept)

    def _create(self, step: Command) -> None:
        """Make an alias: by a descriptor, for whoever owns the directory may swap the name."""
        path = created(step)
        fd = open_private(path)
        self.made.append(path)
        try:
            argv = [*step.argv[:-2], f"/proc/self/fd/{fd}", step.argv[-1]]
            self.qemu.run(argv, cwd=step.cwd, pass_fds=(fd,))
        finally:
            os.close(fd)
        with HostFile(path) as file:
            read_header(file)

    def repoints_above(self, step: Command) -> bool:
        """What backs on the kept image is led to the result: from here on only forward."""
        return "-u" in step.argv and step.argv[0] == "rebase" and self.t_path not in step.writes

    def _before_pull(self) -> None:
        """A pull that was killed at its end left the alias in the header: restore it first.

        qemu-img would take the alias for the new backing and pull nothing.
        """
        if led_away(self):
            restore_backing(self)

    def _adopt(self, image: Path) -> None:
        assert self.journal is not None and self.record.copy is not None
        file = HostFile(image)
        self.opened.append(file)
        header = read_header(file)
        header.require_readable(image)
        layer = Qcow2Layer(image, file, header)
        self.locks.join(layer)
        self.journal.adopt(self.record.copy, layer)

    def close(self) -> None:
        """Close what was opened for this group alone."""
        self.old.close()
        for file in self.opened:
            file.close()

    def _is_target(self, path: Path) -> bool:
        file = self._held(path)
        return file is not None and file.id == self.record.goal.id


def _is_file(path: Path, file: HostFile) -> bool:
    """Whether `path` names the open `file`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fd))
    except OSError:
        return False
