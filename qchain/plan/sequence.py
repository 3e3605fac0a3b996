"""The order of writes for one group (design: commit, two-phase pull, compare, switch, delete).

What the guest reads if everything stops after a step is said beside each step:
j is the kept image, t the target, N the new backing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qchain.chain.layer import Layer
from qchain.chain.scan import WORK_PREFIX
from qchain.plan import bitmapsteps
from qchain.plan.bitmaps import NOTHING, Fate, has_bitmaps
from qchain.plan.candidates import Candidate
from qchain.plan.commands import (
    commit_argv,
    create_empty_argv,
    rebase_safe_argv,
    rebase_unsafe_argv,
    rebase_writethrough_argv,
    resize_shrink_argv,
)
from qchain.plan.names import (
    MANIFEST_SUFFIX,
    absolute_name,
    backing_name,
    relative_name,
    saved_name,
    valid_name,
)
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Group
from qchain.plan.steps import (
    Command,
    Compare,
    Confirm,
    Freeze,
    HardLink,
    MakeDirectory,
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
)

__all__ = ["MANIFEST", "Above", "keep_manifest", "lead", "repoint", "sequence"]

MANIFEST = "manifest"
"""The work file with the digests of the kept point (`qchain.verify.manifest`)."""


@dataclass
class Above:
    """The image that backs on the kept one after the merges above it, if there is one."""

    path: Path
    format: str
    relative: bool


@dataclass
class _Builder:
    layers: Sequence[Layer]
    group: Group
    candidate: Candidate
    options: MergeOptions
    token: str
    above: Sequence[Above]
    fate: Fate
    elsewhere: Sequence[Path] = ()
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.candidate.target is not None
        self.t_index = self.candidate.target
        self.t = self.layers[self.t_index]
        self.j = self.layers[self.group.kept]
        self.lowest = self.layers[self.group.members[-1]]
        self.lowest_owned = self.layers[self.group.owned[-1]]
        position = self.group.line.index(self.t_index)
        self.present = (
            None if position + 1 == len(self.group.line) else self.group.line[position + 1]
        )
        self.t_path, self.j_path = absolute_name(self.t.path), absolute_name(self.j.path)
        self.work = self.t_path.parent / f"{WORK_PREFIX}{self.token}"
        self.manifest = self.work / MANIFEST
        self.alias = f"{WORK_PREFIX}{self.token}.b"
        self.pulls = self.t_index != self.group.members[-1] or bool(self.group.onto)
        self.room = 0 if self.t.file.is_block_device else self.candidate.target_growth_bytes
        # Neither link nor alias beside a device; and in /dev both would not outlive power loss.
        # Whoever opens an image through a link looks for the alias beside that link.
        self.direct = self.pulls and (self.t.file.is_block_device or bool(self.elsewhere))
        # The kept image's bitmaps are to outlive a commit that is killed.
        self.covered = self.t is not self.j and has_bitmaps(self.j)
        self.native = self.candidate.engine == "native"
        self.pending = self.work / "pending"

    def add(self, *steps: Step) -> None:
        self.steps.extend(steps)

    # --- the new backing: its name as it will stand in the header ----------------

    def backing_name(self, directory: Path) -> str | None:
        """How an image in `directory` names the new backing: as the lowest image did."""
        if self.group.below is None:
            return None
        below = self.layers[self.group.below]
        path = absolute_name(below.path)
        if self.group.onto:
            name = self.other_name(path, directory)
        else:
            name = backing_name(self.lowest, below, directory)
        return valid_name(name, path, self.elsewhere)

    def new_backing(self) -> Path | None:
        if self.group.below is None:
            return None
        return absolute_name(self.layers[self.group.below].path)

    def other_name(self, below: Path, directory: Path) -> str:
        """How it names an image of another chain: relative if its present backing was.

        Where there was none: by the file name alone what lies beside it.
        """
        if self.lowest.backing is None:
            return below.name if below.parent == directory else str(below)
        whole = self.lowest.backing.name.startswith("/")
        return str(below) if whole else relative_name(below, directory)

    def backing_format(self) -> str | None:
        return None if self.group.below is None else self.layers[self.group.below].format

    def point_to(self, image: Path, name: str | None) -> None:
        """Write a header: `image` backs on `name` from now on; made durable."""
        argv = rebase_unsafe_argv(image, self.t.format, name, self.backing_format())
        below = self.new_backing()
        self.add(Command(tuple(argv), label=f"re-point {image.name}", writes=(image,)), Sync(image))
        self.add(Confirm(image, below, self.backing_format()))

    # --- the phases ----------------------------------------------------------------

    def commit(self) -> None:
        # Stopped within: t is half changed, but what lies above hides all that was
        # written, so j reads right, and the commit may be repeated.
        top = self.j_path
        if self.covered:
            self.add(*bitmapsteps.cover(self.j_path, self.j.size, self.work))
            top = self.work / bitmapsteps.COVER
        argv = commit_argv(self.t_path, top, self.j.format)
        label = f"commit {self.j_path.name} into {self.t_path.name}"
        weight = self.candidate.traffic.commit_bytes
        self.add(
            Command(
                tuple(argv),
                weight=weight,
                label=label,
                writes=(self.t_path, top),
                commits=True,
                room=self.room,
            ),
            Sync(self.t_path),
        )
        if self.t.size > self.j.size:
            # j never reads beyond its own size.
            shrink = resize_shrink_argv(self.t_path, self.t.format, self.j.size)
            label = f"shrink {self.t_path.name}"
            self.add(Command(tuple(shrink), label=label, writes=(self.t_path,)))
            self.add(Sync(self.t_path))

    def pull_directly(self) -> None:
        # Stopped within: writethrough puts clusters and tables on the disk before the header
        # names N, so whichever backing it names t reads the same (about four times slower).
        name = self.backing_name(self.t_path.parent)
        argv = rebase_writethrough_argv(self.t_path, self.t.format, name, self.backing_format())
        label = f"pull into {self.t_path.name}"
        weight = self.candidate.traffic.pull_bytes
        writes = (self.t_path,)
        self.add(Command(tuple(argv), weight=weight, label=label, writes=writes, room=self.room))
        self.add(Sync(self.t_path), Confirm(self.t_path, self.new_backing(), self.backing_format()))

    def pull(self) -> None:
        present = self.t.backing
        named = (None, None) if present is None else (present.name, present.format)
        directory = self.t_path.parent
        link = self.work / "image"
        size = self.t.size if self.present is None else self.layers[self.present].size
        # Beside t the alias is its present backing, within the work directory the new
        # one: whichever header t has, opened by its own name it reads its old content.
        self.add(
            HardLink(self.t_path, link),
            Command(
                tuple(create_empty_argv(self.alias, size, *named)),
                cwd=directory,
                label="prepare",
            ),
        )
        if self.group.below is None:
            # Of an image without a byte nothing is read to be compared.
            self.add(
                Command(
                    tuple(create_empty_argv(self.work / self.alias, 0)),
                    cwd=directory,
                    label="prepare",
                )
            )
        else:
            new = self.layers[self.group.below]
            new_path = absolute_name(new.path)
            mistaken = present is not None and os.path.realpath(
                self.work / present.name
            ) == os.path.realpath(new_path)
            if mistaken or self.group.below not in self.group.line:
                # Seen from the work directory the present name would mean the new
                # backing: qemu would think nothing lies between. An overlay is neither.
                # And what is not in the chain is opened as what -F says, qcow2.
                self.add(
                    Command(
                        tuple(
                            create_empty_argv(
                                self.work / self.alias, new.size, new_path, new.format
                            )
                        ),
                        cwd=directory,
                        label="prepare",
                    )
                )
            else:
                self.add(SymbolicLink(new_path, self.work / self.alias))
        # j reads through it once the header of t has it: so must all who may read j.
        self.add(TakeAttributes(self.j_path, directory / self.alias))
        self.add(Sync(directory / self.alias), Sync(self.work), Sync(directory))
        argv = rebase_safe_argv(link, self.alias, *named)
        label = f"pull into {self.t_path.name}"
        weight = self.candidate.traffic.pull_bytes
        self.add(
            Command(
                tuple(argv),
                cwd=directory,
                weight=weight,
                label=label,
                writes=(self.t_path,),
                room=self.room,
            )
        )
        self.add(Sync(self.t_path))

    def write(self) -> None:
        """All of it by the native engine: the target reads as before until the switch."""
        verb = "pull" if self.t is self.j else "merge"
        label = f"{verb} into {self.t_path.name}"
        name, fmt = self.way(self.final()), self.backing_format()
        weight = self.candidate.write_bytes
        self.add(NativeWrite(self.t_path, self.pending, name, fmt, weight, label))
        self.add(Sync(self.t_path))

    def switch_header(self) -> None:
        """One sector: the old tables or the new ones, both read right."""
        self.add(NativeSwitch(self.t_path, self.pending), Sync(self.t_path))
        self.add(Confirm(self.t_path, self.new_backing(), self.backing_format()))
        self.add(NativeFree(self.t_path, self.pending), Sync(self.t_path))

    def verify(self) -> None:
        if self.options.verify == "none":
            return
        own = not self.pulls or self.direct or self.native
        new = self.t_path if own else self.work / "image"
        below = self.new_backing()
        moved = self.candidate.traffic.commit_bytes + self.candidate.traffic.pull_bytes
        if self.options.verify == "full":
            moved = self.j.size
        elif self.options.verify == "manifest":
            moved += self.j.size
        formats = (self.j.format, self.t.format)
        manifest = self.manifest if self.options.verify == "manifest" else None
        pending = self.pending if self.native else None
        self.add(
            Compare(
                self.j_path, new, below, *formats, moved, self.backing_format(), manifest, pending
            )
        )

    def way(self, final: Path) -> str | None:
        """The backing name during the switch: absolute where the directory changes."""
        if final.parent == self.t_path.parent or self.group.below is None:
            return self.backing_name(self.t_path.parent)
        return str(absolute_name(self.layers[self.group.below].path))

    def final(self) -> Path:
        """The name of the result."""
        if self.options.names == "kept":
            return self.j_path
        if self.options.names == "lowest":
            return absolute_name(self.lowest_owned.path)
        return self.t_path

    def switch(self) -> Path:
        """Give the result its name; returns it."""
        directory = self.t_path.parent
        final = self.final()
        name_here, way = self.backing_name(directory), self.way(final)
        if self.options.keep_files and final != self.t_path:
            # Before any header changes: that it cannot be made must stop nothing halfway.
            self.add(HardLink(final, saved_name(final)))
        linked = self.pulls and not self.direct and not self.native
        if self.native:
            self.switch_header()
        elif linked or way != name_here:
            # Every cluster is durable: the header alone changes, j reads the same.
            self.point_to(self.t_path, way)
        if linked:
            self.add(Unlink(self.work / "image"), Unlink(self.work / self.alias))
            self.add(Unlink(directory / self.alias))
        kept = self.group.kept if self.t is self.j else None
        self.add(*bitmapsteps.place(self.fate, self.t_path, self.work, kept))
        if final != self.t_path:
            self.add(TakeAttributes(final, self.t_path), Sync(self.t_path))
            if self.options.names == "kept":
                # One rename is the switch: before it j is the old file, after it the new.
                self.add(Rename(self.t_path, final), Sync(final.parent))
            else:
                # t keeps its name until whatever backs on it knows the other one.
                spare = final.with_name(f"{WORK_PREFIX}{self.token}.new")
                self.add(HardLink(self.t_path, spare), Rename(spare, final), Sync(final.parent))
        if self.options.names != "kept" and final != self.j_path:
            for above in self.above:
                self.add(*lead(above, final, self.t.format))
        return final

    def delete(self, final: Path) -> None:
        """Remove the names that are left over, from the top down: what backs goes last."""
        directories = {self.t_path.parent}
        renamed = self.options.names == "kept" and final != self.t_path
        for index in self.group.owned:
            path = absolute_name(self.layers[index].path)
            if path == final or (renamed and path == self.t_path):
                continue
            if self.options.keep_files and path != self.t_path:
                continue
            if self.layers[index].file.is_block_device:
                continue  # whoever made it takes it away
            self.add(Unlink(path))
            directories.add(path.parent)
        name = self.backing_name(final.parent)
        if final.parent != self.t_path.parent and name != self.way(final):
            # Only now does nobody read it from its old directory any more.
            self.point_to(final, name)
        self.add(*(Sync(directory) for directory in sorted(directories)))


def lead(above: Above, final: Path, fmt: str) -> list[Step]:
    """Let an image that backs on a kept one name its result, `final`, of format `fmt`."""
    name = relative_name(final, above.path.parent) if above.relative else str(final)
    argv = rebase_unsafe_argv(above.path, above.format, name, fmt)
    label = f"re-point {above.path.name}"
    command = Command(tuple(argv), label=label, writes=(above.path,))
    return [command, Sync(above.path), Confirm(above.path, final, fmt)]


def sequence(
    layers: Sequence[Layer],
    group: Group,
    candidate: Candidate,
    options: MergeOptions,
    token: str,
    above: Sequence[Above],
    fate: Fate = NOTHING,
    elsewhere: Sequence[Path] = (),
) -> tuple[list[Step], Path]:
    """The steps that merge `group` by `candidate`, and the path of the result.

    Args:
        token: makes the names of the work directory and the aliases unique.
        above: what backs on the kept image, for the policies that re-point it.
        fate: what becomes of the group's bitmaps.
        elsewhere: directories of links from which qemu may resolve a backing name of it.
    """
    builder = _Builder(layers, group, candidate, options, token, above, fate, elsewhere)
    builder.add(MakeDirectory(builder.work))
    builder.add(*bitmapsteps.save(layers, fate, builder.work, builder.j.size))
    if builder.t is not builder.j and not builder.native:
        builder.add(*bitmapsteps.prune(builder.t_path, fate.removed))
    if builder.t.format == "qcow2" and not builder.native:
        builder.add(Freeze(builder.t_path, builder.work / "before"))
    if options.verify == "manifest":
        builder.add(TakeManifest(builder.j_path, builder.manifest, builder.j.size))
    if builder.native:
        builder.write()
    elif builder.t is not builder.j:
        builder.commit()
    if builder.direct and not builder.native:
        builder.pull_directly()
    elif builder.pulls and not builder.native:
        builder.pull()
    builder.verify()
    final = builder.switch()
    builder.delete(final)
    if builder.native:
        builder.add(Unlink(builder.pending))
    elif builder.t.format == "qcow2":
        builder.add(Unlink(builder.work / "before"), Unlink(builder.work / "rescued"))
    if options.verify == "manifest":
        builder.add(*keep_manifest(builder.manifest, final, options))
    if fate.carried:
        builder.add(Unlink(builder.work / bitmapsteps.BITMAPS))
    if builder.covered and not builder.native:
        builder.add(Unlink(builder.work / bitmapsteps.COVER))
    builder.add(RemoveDirectory(builder.work), Sync(builder.t_path.parent))
    return builder.steps, final


def keep_manifest(manifest: Path, final: Path, options: MergeOptions) -> list[Step]:
    """The manifest goes; with --keep-files it stays beside the result."""
    kept: list[Step] = []
    if options.keep_files:
        kept = [HardLink(manifest, saved_name(final, MANIFEST_SUFFIX)), Sync(final.parent)]
    return [*kept, Unlink(manifest)]


def repoint(
    layers: Sequence[Layer], group: Group, candidate: Candidate, options: MergeOptions
) -> tuple[list[Step], Path]:
    """The steps that lead the kept image of `group` to a new backing that shows the same.

    One header write: the old backing or the new one, both read right.
    """
    builder = _Builder(layers, group, candidate, options, "", (), NOTHING)
    builder.point_to(builder.j_path, builder.backing_name(builder.j_path.parent))
    return builder.steps, builder.j_path
