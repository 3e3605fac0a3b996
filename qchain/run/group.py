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

from qchain.chain.layer import Layer, Qcow2Layer, RawLayer
from qchain.chain.scan import WORK_PREFIX
from qchain.errors import FailedMidway, QchainError, Refused
from qchain.hostfile import HostFile
from qchain.plan.commands import rebase_unsafe_argv, unlocked_argv
from qchain.plan.steps import (
    Adopt,
    Command,
    Compare,
    Confirm,
    ConfirmBitmaps,
    Freeze,
    HardLink,
    MakeDirectory,
    RemoveDirectory,
    Rename,
    Step,
    SymbolicLink,
    Sync,
    TakeAttributes,
    Unlink,
)
from qchain.plan.traffic import commit_granularity
from qchain.qcow2.header import read_header
from qchain.run.attributes import open_to_all_of, take_attributes
from qchain.run.bitmaps import as_it_is, confirm_bitmaps, give_back
from qchain.run.confirm import confirm, require_same_size
from qchain.run.durable import fsync_directory, fsync_file, fsync_open
from qchain.run.identity import state_of
from qchain.run.journal import GroupRecord, Journal, LayerRecord
from qchain.run.locking import ChainLocks
from qchain.run.private import make_private, open_private
from qchain.run.qemu_img import QemuImg
from qchain.verify.compare import Comparison, compare
from qchain.verify.frozen import freeze, frozen_view, map_digest, open_rescued, rescue

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
        self.record, self.layers, self.verify = record, layers, verify
        self.qemu, self.observer, self.locks = qemu, observer, locks
        self.t = layers[record.target] if layers and record.copy is None else None
        self.t_path = record.goal.path
        # The kept point as it reads before the merge, through files held open.
        self.old: list[Layer] = list(layers[: len(record.line)])
        self.below: list[Layer] = [] if record.below is None else list(layers[record.below :])
        self.comparison: Comparison | None = None
        self.opened: list[HostFile] = []
        self.journal: Journal | None = None
        self.made: list[Path] = []
        self.links: list[tuple[Path, Path]] = []
        self.names = {known.path for known in record.layers}
        self.switched = False
        self.resumed = False

    def perform(self, step: Step) -> None:
        """Do one step. Raises `QchainError` or `OSError` when it fails."""
        match step:
            case Command():
                self._command(step)
            case Adopt(image):
                self._adopt(image)
            case Freeze(_, into):
                self._freeze(into)
            case Compare():
                self._compare(step)
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
                self._note_link(existing, link)
            case SymbolicLink(target, link):
                if not (link.is_symlink() and link.readlink() == target):
                    link.symlink_to(target)
                self._note(link)
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

    def _note(self, path: Path) -> None:
        """Work files of ours are removed when the group is put back."""
        if path.parent in self.made:
            self.made.append(path)

    def _note_link(self, existing: Path, link: Path) -> None:
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
            self._flush(path)

    def _flush(self, path: Path) -> None:
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
        self.switched = self.switched or self._repoints_above(step)
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
        passing = between if step.commits else ()
        with self.locks.handed_over(step.writes, passing, named) as held:
            self.qemu.run(
                unlocked_argv(step.argv) if held else step.argv,
                progress=lambda part: self.observer.advance(int(part * step.weight), step.weight),
                cwd=step.cwd,
                pass_fds=held,
            )
        if before is not None and map_digest(named) != before:
            raise FailedMidway(
                named, f"its map or length changed while 'qemu-img {verb}' ran, which must not be"
            )

    def _create(self, step: Command) -> None:
        """Make an alias: by a descriptor, for whoever owns the directory may swap the name."""
        path = _created(step)
        fd = open_private(path)
        self.made.append(path)
        try:
            argv = [*step.argv[:-2], f"/proc/self/fd/{fd}", step.argv[-1]]
            self.qemu.run(argv, cwd=step.cwd, pass_fds=(fd,))
        finally:
            os.close(fd)
        with HostFile(path) as file:
            read_header(file)

    def _repoints_above(self, step: Command) -> bool:
        """What backs on the kept image is led to the result: from here on only forward."""
        return "-u" in step.argv and step.argv[0] == "rebase" and self.t_path not in step.writes

    def _before_pull(self) -> None:
        """A pull that was killed at its end left the alias in the header: restore it first.

        qemu-img would take the alias for the new backing and pull nothing.
        """
        if self._led_away():
            self.restore_backing()

    def _adopt(self, image: Path) -> None:
        assert self.journal is not None and self.record.copy is not None
        file = HostFile(image)
        self.opened.append(file)
        header = read_header(file)
        header.require_readable(image)
        layer = Qcow2Layer(image, file, header)
        self.locks.join(layer)
        self.journal.adopt(self.record.copy, layer)

    def _freeze(self, into: Path) -> None:
        assert isinstance(self.t, Qcow2Layer)
        rescued = into.with_name("rescued")
        self.made += [into, rescued]
        freeze(self.t, into)
        if self.record.target > 0:
            rescue(self.layers, self.record.target, commit_granularity(self.t), rescued)
        self._look_back(into)

    def _look_back(self, copy: Path) -> None:
        """See the kept point through the frozen map of the target from now on."""
        assert isinstance(self.t, Qcow2Layer)
        frozen = frozen_view(self.t, copy)
        self.opened.append(frozen.tables.file)
        place = self.record.target
        self.old = list(self.layers[: len(self.record.line)])
        self.old[place] = frozen
        kept_out = open_rescued(self.t, copy.with_name("rescued"))
        if kept_out is not None:
            self.opened.append(kept_out.file)
            self.old.insert(place, kept_out)

    def _compare(self, step: Compare) -> None:
        self.observer.step("verify", step.weight)
        file = HostFile(step.new)
        self.opened.append(file)
        if file.id != self.record.goal.id:
            raise FailedMidway(step.new, "is not the file that was merged into")
        new: Layer
        if self.record.goal.format == "raw":
            new = RawLayer(step.new, file)
        else:
            header = read_header(file)
            header.require_readable(step.new)
            new = Qcow2Layer(step.new, file, header)
        if new.size != self.old[0].size:
            raise FailedMidway(
                step.new, f"has {new.size} bytes after the merge, not {self.old[0].size}"
            )
        old = list(self.old)
        if self.record.target > 0:
            old[0] = self._fresh(old[0])
        self.comparison = compare(
            old,
            [new, *self.below],
            everything=self.verify == "full",
            progress=self.observer.advance,
        )
        if not self.comparison.identical:
            raise FailedMidway(
                step.old,
                f"the merged result differs at guest offset {self.comparison.first_difference} "
                f"({self.comparison.different_bytes} bytes differ); nothing was deleted"
                + self.resumed
                * ", and a guest that ran after the stop may be the reason",
            )

    def _fresh(self, layer: Layer) -> Layer:
        """The kept image as it is now: where others were let in, more may be mapped by now."""
        file = HostFile(layer.path)
        self.opened.append(file)
        header = read_header(file)
        if file.id != layer.file.id or header.size != layer.size:
            raise FailedMidway(layer.path, "is not what it was when the merge began")
        header.require_readable(layer.path)
        return Qcow2Layer(layer.path, file, header)

    # --- going on and going back ----------------------------------------------------

    def resume(self, step: int) -> None:
        """Be as one who has done the steps before `step`."""
        self.resumed = True
        for index in range(step):
            self.resume_at(index, done=True)

    def resume_at(self, index: int, *, done: bool = False) -> None:
        """Note what step `index` leaves behind; unless `done` it may not have been reached."""
        step = self.record.steps[index]
        switches = isinstance(step, Rename)
        if isinstance(step, Unlink):
            switches = step.path in self.names and (done or not os.path.lexists(step.path))
        elif isinstance(step, Command):
            switches = self._repoints_above(step)
        elif isinstance(step, Rename) and not done:
            # Whether it was reached shows in the names.
            switches = not os.path.lexists(step.old)
        self.switched = self.switched or switches
        match step:
            case MakeDirectory(path):
                self.made.append(path)
            case Freeze(_, into):
                self.made += [into, into.with_name("rescued")]
                if done and into.exists() and self.layers:
                    self._look_back(into)
            case HardLink(existing, link):
                self._note_link(existing, link)
            case SymbolicLink(_, link):
                self._note(link)
            case Command(argv) if argv[0] == "create":
                self.made.append(_created(step))
            case Command(argv) if argv[0] == "convert":
                self.made.append(self.t_path)
            case _:
                pass

    def restore_backing(self) -> None:
        """Let the target's header name its old backing file again; its content is the same."""
        name, fmt = self.record.present or (None, None)
        argv = rebase_unsafe_argv(self.t_path, "qcow2", name, fmt)
        if self.journal is not None:
            self.journal.write(self.journal.group, self.journal.step, (self.t_path,))
        with self.locks.handed_over((self.t_path,), (), self.t_path) as held:
            self.qemu.run(unlocked_argv(argv) if held else argv, pass_fds=held)
        self._flush(self.t_path)
        below = None if name is None else self.record.layers[self.record.target + 1].path
        confirm(self.t_path, below, fmt, None, self.switched)

    def _led_away(self) -> bool:
        """Whether the target's header names another backing file than before the merge."""
        present, raw = self.record.present, self.record.layers[self.record.target].format == "raw"
        if raw or (present is None and not self.record.onto):
            return False
        with HostFile(self.t_path) as file:
            name = read_header(file).backing_name
            if file.id == self.record.layers[self.record.target].id:
                return name != (None if present is None else present[0])
        if name is not None and WORK_PREFIX in name:
            raise FailedMidway(self.t_path, "is another file, and backs on a work file")
        if any(path.name.endswith(".b") and os.path.lexists(path) for path in self.made):
            # The image that was pulled into has another name now, and may name an alias.
            raise FailedMidway(self.t_path, "is another file than the one pulled into")
        return False  # another file: not ours to change

    def put_back(self) -> bool:
        """Undo what was not switched, remove work files; whether that succeeded. Never raises."""
        if self.switched:
            return False
        try:
            if self._led_away():
                self.restore_backing()
            give_back(self)
        except (QchainError, OSError):
            return False  # the aliases must stay: the header may still name them
        with contextlib.suppress(QchainError, OSError):
            self._from_the_start()
        for existing, link in self.links:
            with contextlib.suppress(OSError):
                if link.samefile(existing):
                    link.unlink()
        for path in reversed(self.made):
            with contextlib.suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)
        return not any(os.path.lexists(path) for path in self.made)

    def _from_the_start(self) -> None:
        """Whoever goes on from here has no work files any more: the first step is the next."""
        if self.journal is not None:
            self.journal.altered = bool(self.altered(self.journal.step))
            self.journal.carrying = False
            self.journal.settle()
            self.journal.write(self.journal.group, 0)

    def altered(self, index: int) -> list[Path]:
        """The dropped points that read otherwise than before, if the merge ends at step `index`.

        A commit writes to the target: what shows through it, and is no kept point, changes.
        """
        steps = self.record.steps
        commit = next(
            (n for n, step in enumerate(steps) if isinstance(step, Command) and step.commits), None
        )
        before = self.journal is not None and self.journal.altered
        if commit is None or (index < commit and not before):
            return []
        known = self.record.layers[self.record.target]
        if index <= commit + 1 and not before:
            # It may not have come to the first write: then the file is as it was noted.
            with contextlib.suppress(QchainError, OSError), HostFile(self.t_path) as file:
                if file.id == known.id and state_of(file) == known.state:
                    return []
        return [record.path for record in self.record.layers[1 : self.record.target + 1]]

    def close(self) -> None:
        """Close what was opened for this group alone."""
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


def _created(step: Command) -> Path:
    """The image that a `create` makes: its last argument but the size, or the last."""
    name = Path(step.argv[-2])
    return name if step.cwd is None else step.cwd / name
