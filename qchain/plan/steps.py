"""The steps of a plan: small, repeatable, each as JSON, as a shell line, and performed by `run`.

A step says what is done, not how it went: the executor (`qchain.run.execute`)
performs them in order, a dry run prints them.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from qchain.errors import printable
from qchain.plan.commands import image_opts

__all__ = [
    "Adopt",
    "Command",
    "Compare",
    "Confirm",
    "ConfirmBitmaps",
    "Freeze",
    "HardLink",
    "MakeDirectory",
    "NativeCopy",
    "NativeFree",
    "NativeSwitch",
    "NativeWrite",
    "RemoveDirectory",
    "Rename",
    "Step",
    "SymbolicLink",
    "Sync",
    "TakeAttributes",
    "TakeManifest",
    "Unlink",
    "shell_line",
    "written_by",
]


@dataclass(frozen=True, slots=True)
class Command:
    """qemu-img with these arguments (the program's name not included), run in `cwd`.

    `weight`: bytes it is expected to move, for progress. `label`: what a person sees.
    """

    argv: tuple[str, ...]
    cwd: Path | None = None
    weight: int = 0
    label: str = ""
    writes: tuple[Path, ...] = ()
    """Images that qemu-img opens for writing: their locks are handed over to it."""
    commits: bool = False
    """A commit also needs "consistent read" of what lies between its top and its base."""
    room: int = 0
    """Bytes by which the image written to may grow, from the group's first command on."""


@dataclass(frozen=True, slots=True)
class NativeCopy:
    """The group's point in the new file `image`, written by the native engine.

    `name`, `format`: of its backing file, as the header is to have them.
    """

    image: Path
    name: str | None
    format: str | None
    weight: int = 0
    label: str = ""


@dataclass(frozen=True, slots=True)
class NativeWrite:
    """The merged map appended to `image`, and what will be its header kept in `into`.

    `name`, `format`: of its new backing file. Until the switch the image reads as before.
    """

    image: Path
    into: Path
    name: str | None
    format: str | None
    weight: int = 0
    label: str = ""


@dataclass(frozen=True, slots=True)
class NativeSwitch:
    """One write: the header of `image` becomes the one in `source`."""

    image: Path
    source: Path


@dataclass(frozen=True, slots=True)
class NativeFree:
    """The clusters of `image` that only its old header led to become free."""

    image: Path
    source: Path


@dataclass(frozen=True, slots=True)
class Freeze:
    """Keep a copy of the map of `image` in `into`, so that its old view can be read later."""

    image: Path
    into: Path


@dataclass(frozen=True, slots=True)
class TakeManifest:
    """Digests of all that the kept point `image` reads, into the new file `into`."""

    image: Path
    into: Path
    weight: int = 0


@dataclass(frozen=True, slots=True)
class Compare:
    """The kept point `old`, as it read before, against the new view of `new`.

    `below`: the chain that `new` is to be read over, whatever its header names, and
    the format of its uppermost image. `manifest`: what the result is to be held against, too.
    `pending`: where the header is kept that `new` is to be read by, if that is not the one it
    has.
    """

    old: Path
    new: Path
    below: Path | None
    old_format: str = "qcow2"
    new_format: str = "qcow2"
    weight: int = 0
    below_format: str | None = None
    manifest: Path | None = None
    pending: Path | None = None


@dataclass(frozen=True, slots=True)
class Confirm:
    """The header of `image`, read again, names `backing` (None: nothing) as its backing file.

    An exit code is not evidence: what was the backing before goes away only after this.
    `backing_format`: what the header must record of it. `final`: the name from which it is
    to be understood, where the image does not have its last one yet.
    """

    image: Path
    backing: Path | None
    backing_format: str | None = None
    final: Path | None = None


@dataclass(frozen=True, slots=True)
class Adopt:
    """The new file `image` is whole: know it from now on by what it is, not by its name."""

    image: Path


@dataclass(frozen=True, slots=True)
class ConfirmBitmaps:
    """The bitmaps of `image`, read again: each of `names` marks all that was merged into it.

    What was merged is in the commands of the same plan, and their sources are still there.
    `gone`: names of which there must be none.
    """

    image: Path
    names: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MakeDirectory:
    path: Path


@dataclass(frozen=True, slots=True)
class RemoveDirectory:
    path: Path


@dataclass(frozen=True, slots=True)
class HardLink:
    existing: Path
    link: Path


@dataclass(frozen=True, slots=True)
class SymbolicLink:
    target: Path
    link: Path


@dataclass(frozen=True, slots=True)
class TakeAttributes:
    """`target` takes mode, owner, ACLs, extended attributes and labels of `source`."""

    source: Path
    target: Path


@dataclass(frozen=True, slots=True)
class Sync:
    """fsync of a file, or of a directory."""

    path: Path


@dataclass(frozen=True, slots=True)
class Rename:
    old: Path
    new: Path


@dataclass(frozen=True, slots=True)
class Unlink:
    path: Path


Step = (
    Adopt
    | Command
    | Freeze
    | Compare
    | Confirm
    | ConfirmBitmaps
    | MakeDirectory
    | NativeCopy
    | NativeFree
    | NativeSwitch
    | NativeWrite
    | RemoveDirectory
    | HardLink
    | SymbolicLink
    | TakeAttributes
    | TakeManifest
    | Sync
    | Rename
    | Unlink
)


def written_by(step: Step) -> tuple[Path, ...]:
    """The images that a step writes into."""
    match step:
        case Command():
            return step.writes
        case NativeWrite(image) | NativeSwitch(image) | NativeFree(image):
            return (image,)
        case _:
            return ()


def arguments(step: Step, program: str = "qemu-img") -> list[str] | None:
    """The command that does the same by hand; None where there is none."""
    match step:
        case Command(argv):
            return [program, *argv]
        case Compare(pending=Path()):
            return None
        case Compare(old, new, below, old_format, new_format, _, below_format):
            options: dict[str, str | Path] = {"driver": new_format, "file.filename": new}
            if below is not None and below_format is not None:
                # After a pull the header still names the alias, as qcow2 whatever it is.
                options |= {"backing.driver": below_format, "backing.file.filename": below}
            before: dict[str, str | Path] = {"driver": old_format, "file.filename": old}
            return [program, "compare", "--image-opts", image_opts(options), image_opts(before)]
        case MakeDirectory(path):
            return ["mkdir", "-m", "700", "--", str(path)]
        case RemoveDirectory(path):
            return ["rmdir", "--", str(path)]
        case HardLink(existing, link):
            return ["ln", "--", str(existing), str(link)]
        case SymbolicLink(target, link):
            return ["ln", "-s", "--", str(target), str(link)]
        case TakeAttributes(source, target):
            return [
                "cp", "--attributes-only", "--preserve=mode,ownership,xattr", "--",
                str(source), str(target),
            ]  # fmt: skip
        case Sync(path):
            return ["sync", "--", str(path)]
        case Rename(old, new):
            return ["mv", "-T", "--", str(old), str(new)]
        case Unlink(path):
            return ["rm", "-f", "--", str(path)]
        case Freeze() | TakeManifest() | Confirm() | Adopt() | ConfirmBitmaps():
            return None
        case NativeCopy() | NativeWrite() | NativeSwitch() | NativeFree():
            return None


def shell_line(step: Step, program: str = "qemu-img") -> str | None:
    """The step as one line for a shell, quoted; None where nothing is to be typed.

    What qchain writes itself is a comment.
    """
    match step:
        case NativeCopy() | NativeWrite():
            return f"# qchain itself: {printable(step.label)}"
        case Compare(old, new, pending=Path()):
            return (
                f"# qchain itself: compare {printable(new)}, as it will be, with {printable(old)}"
            )
        case NativeSwitch(image):
            return f"# qchain itself: switch {printable(image)}, one write of its first 512 bytes"
        case NativeFree(image):
            return f"# qchain itself: free what only the old header of {printable(image)} led to"
        case _:
            pass
    words = arguments(step, program)
    if words is None:
        return None
    line = shlex.join(words)
    if isinstance(step, Command) and step.cwd is not None:
        return f"(cd {shlex.quote(str(step.cwd))} && {line})"
    return line


def as_json(step: Step, program: str = "qemu-img") -> dict[str, object]:
    """The step for `--json`: argv, rename, unlink, compare or freeze."""
    match step:
        case Rename(old, new):
            return {"rename": [str(old), str(new)]}
        case Unlink(path):
            return {"unlink": str(path)}
        case Compare(old, new, below):
            return {"compare": [str(old), str(new)], "below": None if below is None else str(below)}
        case Confirm(image, backing):
            return {"confirm": [str(image), None if backing is None else str(backing)]}
        case NativeCopy(image, name):
            return {"native": "copy", "image": str(image), "backing": name}
        case NativeWrite(image, _, name):
            return {"native": "write", "image": str(image), "backing": name}
        case NativeSwitch(image):
            return {"native": "switch", "image": str(image)}
        case NativeFree(image):
            return {"native": "free", "image": str(image)}
        case Adopt(image):
            return {"adopt": str(image)}
        case ConfirmBitmaps(image, names, gone):
            return {"confirm_bitmaps": str(image), "names": list(names), "gone": list(gone)}
        case TakeManifest(image, into):
            return {"manifest": [str(image), str(into)]}
        case Freeze(image, into):
            return {"freeze": [str(image), str(into)]}
        case _:
            out: dict[str, object] = {"argv": arguments(step, program)}
            if isinstance(step, Command) and step.cwd is not None:
                out["cwd"] = str(step.cwd)
            return out
