"""Carry out a plan, step by step, and prove the result before anything is deleted.

Crash states: `qchain.plan.sequence` says what the guest reads after each step.
When a step fails before the switch, the group is put back: the header of the
target names its old backing again, work files go, and every point reads as before.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qchain.chain.chain import Chain
from qchain.chain.layer import Layer, Qcow2Layer, RawLayer
from qchain.chain.names import resolve_name
from qchain.errors import FailedMidway, QchainError, Refused
from qchain.hostfile import HostFile
from qchain.plan.commands import rebase_unsafe_argv
from qchain.plan.plan import GroupPlan, Plan
from qchain.plan.steps import (
    Command,
    Compare,
    Confirm,
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
from qchain.run.attributes import take_attributes
from qchain.run.durable import fsync_directory, fsync_file
from qchain.run.locking import ChainLocks
from qchain.run.qemu_img import QemuImg
from qchain.verify.compare import Comparison, compare
from qchain.verify.frozen import RescuedLayer, freeze, frozen_view, rescue

__all__ = ["MergeResult", "Observer", "execute"]


class Observer(Protocol):
    """Who wants to see how it goes on. All amounts in bytes."""

    def step(self, label: str, total: int) -> None:
        """A step of `total` expected bytes begins (0: it is short)."""

    def advance(self, done: int, total: int) -> None:
        """How far the present step is."""


class _Silent:
    def step(self, label: str, total: int) -> None: ...

    def advance(self, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was verified (None: nothing was, as asked) and how long it all took."""

    mode: str
    compared_bytes: int
    identical: bool
    seconds: float


class _GroupRun:
    """One group while it is merged: its old view, and how to put it back."""

    def __init__(
        self, plan: Plan, group: GroupPlan, qemu: QemuImg, observer: Observer, locks: ChainLocks
    ) -> None:
        assert group.chosen is not None and group.chosen.target is not None
        self.plan, self.group, self.qemu, self.observer = plan, group, qemu, observer
        self.locks = locks
        self.layers = plan.layers
        self.target = group.chosen.target
        self.t = self.layers[self.target]
        # The kept point as it reads before the merge, through files held open.
        self.old: list[Layer] = list(self.layers[group.group.kept :])
        self.below = [] if group.group.below is None else list(self.layers[group.group.below :])
        self.comparison: Comparison | None = None
        self.opened: list[HostFile] = []
        self.made: list[Path] = []
        self.pulling = False
        self.confirmed = False

    def perform(self, step: Step) -> None:
        match step:
            case Command():
                self._command(step)
            case Freeze(_, into):
                self._freeze(into)
            case Compare():
                self._compare(step)
            case Confirm(image, backing):
                self._confirm(image, backing)
            case MakeDirectory(path):
                path.mkdir(mode=0o700)
                self.made.append(path)
            case RemoveDirectory(path):
                path.rmdir()
            case HardLink(existing, link):
                os.link(existing, link, follow_symlinks=False)
                self._note(link)
            case SymbolicLink(target, link):
                link.symlink_to(target)
                self._note(link)
            case TakeAttributes(source, target):
                take_attributes(source, target)
            case Sync(path):
                (fsync_directory if path.is_dir() else fsync_file)(path)
            case Rename(old, new):
                self.locks.before_switch(self.layers[self.group.group.kept])
                old.rename(new)
            case Unlink(path):
                path.unlink(missing_ok=True)

    def _note(self, path: Path) -> None:
        if path.parent in self.made:
            self.made.append(path)

    def _command(self, step: Command) -> None:
        self.observer.step(step.label, step.weight)
        verb = step.argv[0]
        if verb == "create":
            image = Path(step.argv[-2])
            self.made.append(image if step.cwd is None else step.cwd / image)
        if verb == "rebase" and "-u" not in step.argv:
            self.pulling = True
        between = [
            layer for layer in self.layers[self.group.group.kept + 1 : self.target] if step.commits
        ]
        with self.locks.handed_over(step.writes, between):
            self.qemu.run(
                step.argv,
                progress=lambda part: self.observer.advance(int(part * step.weight), step.weight),
                cwd=step.cwd,
            )

    def _freeze(self, into: Path) -> None:
        assert isinstance(self.t, Qcow2Layer)
        self.made.append(into)
        freeze(self.t, into)
        place = self.target - self.group.group.kept
        kept_out: RescuedLayer | None = None
        if place > 0:
            rescued = into.with_name("rescued")
            kept_out = rescue(self.old, place, commit_granularity(self.t), rescued)
            self.made.append(rescued)
        frozen = frozen_view(self.t, into)
        self.opened.append(frozen.tables.file)
        self.old[place] = frozen
        if kept_out is not None:
            self.opened.append(kept_out.file)
            self.old.insert(place, kept_out)

    def _compare(self, step: Compare) -> None:
        self.observer.step("verify", step.weight)
        file = HostFile(step.new)
        self.opened.append(file)
        if file.id != self.t.file.id:
            raise FailedMidway(step.new, "is not the file that was merged into")
        new: Layer
        if self.t.format == "raw":
            new = RawLayer(step.new, file)
        else:
            header = read_header(file)
            header.require_readable(step.new)
            new = Qcow2Layer(step.new, file, header)
        if new.size != self.old[0].size:
            raise FailedMidway(
                step.new, f"has {new.size} bytes after the merge, not {self.old[0].size}"
            )
        self.comparison = compare(
            self.old,
            [new, *self.below],
            everything=self.plan.options.verify == "full",
            progress=self.observer.advance,
        )
        if not self.comparison.identical:
            raise FailedMidway(
                step.old,
                f"the merged result differs at guest offset {self.comparison.first_difference} "
                f"({self.comparison.different_bytes} bytes differ); nothing was deleted",
            )

    def _confirm(self, image: Path, backing: Path | None) -> None:
        with HostFile(image) as file:
            name = read_header(file).backing_name
        found = None if name is None else resolve_name(name, image)
        same = (
            found is None
            if backing is None
            else found is not None and found.exists() and found.samefile(backing)
        )
        if not same:
            raise FailedMidway(
                image,
                f"its header names {name!r} as backing file after 'rebase -u', which is wrong",
            )
        if image == Path(os.path.abspath(self.t.path)):
            self.confirmed = True

    def put_back(self) -> None:
        """After a failure: undo what was not switched, remove work files. Never raises."""
        if self.pulling and not self.confirmed and self.t.backing is not None:
            # Its clusters are still all there; only the header has to name the old backing.
            path = Path(os.path.abspath(self.t.path))
            argv = rebase_unsafe_argv(path, "qcow2", self.t.backing.name, self.t.backing.format)
            try:
                with self.locks.handed_over((path,), ()):
                    self.qemu.run(argv)
                below = self.layers[self.target + 1].path
                self._confirm(path, Path(os.path.abspath(below)))
                fsync_file(path)
            except (QchainError, OSError):
                return  # the aliases must stay: the header may still name them
        for path in reversed(self.made):
            with contextlib.suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        for file in self.opened:
            file.close()


def execute(
    plan: Plan,
    chain: Chain,
    qemu: QemuImg | None = None,
    observer: Observer | None = None,
    before_step: Callable[[Step], None] | None = None,
) -> MergeResult:
    """Merge as `plan` says; `chain` is the chain it was made from, still open.

    `before_step` is called before each step (tests stop there).

    Raises: `Refused` before anything was changed (the plan has refusals, an image is in
        use); `FailedMidway` when a step failed, every kept point being intact.
    """
    if plan.refusals:
        raise Refused("merge", plan.refusals[0], "")
    begun = time.monotonic()
    qemu = qemu or QemuImg()
    observer = observer or _Silent()
    compared, verified = 0, True
    with ChainLocks(chain.layers) as locks:
        for group in plan.groups:
            run = _GroupRun(plan, group, qemu, observer, locks)
            try:
                for step in group.steps:
                    if before_step is not None:
                        before_step(step)
                    run.perform(step)
            except KeyboardInterrupt:
                run.put_back()
                raise
            except OSError as error:
                run.put_back()
                name = error.filename or plan.layers[0].path
                raise FailedMidway(
                    str(name),
                    (error.strerror or str(error)).lower(),
                    "every kept point is intact; mend this and merge again",
                ) from None
            except QchainError as error:
                run.put_back()
                raise FailedMidway(
                    error.what, error.why, "every kept point is intact; merge again when mended"
                ) from None
            finally:
                run.close()
            if run.comparison is not None:
                compared += run.comparison.compared_bytes
                verified = verified and run.comparison.identical
    mode = plan.options.verify
    return MergeResult(mode, compared, verified and mode != "none", time.monotonic() - begun)
