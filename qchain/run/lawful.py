"""What the steps of a journal may touch: the images of the chain, and work files beside them.

The writer of a journal is trusted no further than a merge goes. A step that no plan
would have is refused before anything is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from qchain.chain.scan import JOURNAL_SUFFIX, WORK_PREFIX, identity
from qchain.errors import ImageError, Refused
from qchain.plan.names import MANIFEST_SUFFIX, SAVED_SUFFIX
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
)
from qchain.run.journal import GroupRecord, Journal

__all__ = ["given_up", "require_lawful"]

_VERBS = frozenset({"bitmap", "commit", "convert", "create", "rebase", "resize"})


def require_lawful(journal: Journal) -> None:
    """Raise `Refused` or `ImageError` for a journal that no merge would have written here."""
    here, home = journal.path.parent, journal.active.parent
    try:
        same = here.samefile(home)
    except OSError:
        same = False
    if not same or here.stat().st_ino != journal.home_inode:
        raise _not_from_here(journal, here, home)
    for record in journal.groups:
        rule = _Rule(journal, record)
        if not record.steps:
            raise ImageError(journal.path, "is not a journal of qchain: it has no steps", "")
        for step in record.steps:
            rule.check(step)


def given_up(journal: Journal) -> str:
    """What to do with a journal whose images are not there any more.

    An image that was saved amid the merge may back on one of its work files.
    """
    active = journal.path.with_name(journal.active.name)
    return (
        f"if 'qchain chain {active}' shows the chain whole, and no layer named .qchain-*, delete "
        "this journal: the merge is given up then, and the images stay as they are now"
    )


def _not_from_here(journal: Journal, here: Path, home: Path) -> Refused:
    """The refusal of a journal that is about another directory, `home`, than it lies in."""
    known = [each for record in journal.groups for each in (*record.members, record.goal)]
    moved = any(identity(here / each.path.name) == each.id for each in known)
    if home.exists() and not here.samefile(home):
        return Refused(
            journal.path,
            f"is the journal of a merge in {home}, not of one here: a copy, or moved",
            f"recover the original in {home}; if this is a copy that nobody needs, delete it",
        )
    if moved:
        way = f"put the directory itself back as {home}, then 'qchain recover' there"
        return Refused(journal.path, f"was written in {home}, and was moved since", way)
    why = "is about images that are not here any more: all were restored, it seems, or copied"
    return Refused(journal.path, why, given_up(journal))


class _Rule:
    """The files that one group is about."""

    def __init__(self, journal: Journal, group: GroupRecord) -> None:
        self.journal, self.group = journal, group
        self.chain = {record.path for record in group.chain}
        self.members = {record.path for record in group.members}
        self.places = {path.parent for path in self.members}
        self.directories = {path.parent for path in self.chain}

    def check(self, step: Step) -> None:
        if not (_well_typed(step) and self._allowed(step)):
            raise Refused(
                self.journal.path,
                f"holds a step that no merge of these images has ({type(step).__name__})",
                "look at it; nothing was changed",
            )

    def _allowed(self, step: Step) -> bool:
        match step:
            case Command():
                return self._command(step)
            case Adopt(image) | NativeCopy(image):
                return self.group.copy is not None and self._new(image)
            case Freeze(image, into) | NativeWrite(image, into):
                return image in self.members and self._work(into)
            case NativeSwitch(image, source) | NativeFree(image, source):
                return image == self.group.goal.path and self._work(source)
            case TakeManifest(image, into):
                return image in self.members and self._work(into)
            case Compare(old, new, below):
                return (
                    old in self.members
                    and (step.manifest is None or self._work(step.manifest))
                    and (step.pending is None or self._work(step.pending))
                    and (new in self.members or self._work(new))
                    and (below is None or below in self.chain)
                )
            case Confirm(image, backing):
                return image in self.chain and (backing is None or backing in self.chain)
            case ConfirmBitmaps(image):
                return image in self.members or self._work(image)
            case MakeDirectory(path) | RemoveDirectory(path):
                return self._beside(path)
            case HardLink(existing, link):
                if self._saved(link, MANIFEST_SUFFIX):
                    return self._work(existing)
                return existing in self.members and (self._work(link) or self._saved(link))
            case SymbolicLink(target, link):
                return target in self.chain and self._work(link)
            case TakeAttributes(source, target):
                return source in self.members and (target in self.members or self._work(target))
            case Sync(path):
                return path in self.chain | self.directories or self._work(path)
            case Rename(old, new):
                return new in self.members and (old in self.members or self._work(old))
            case Unlink(path):
                return path in self.members or self._work(path)

    def _command(self, step: Command) -> bool:
        argv = step.argv
        if len(argv) < 3 or argv[0] not in _VERBS:
            return False
        if not all(path in self.chain or self._work(path) for path in step.writes):
            return False
        if step.cwd is not None and step.cwd not in self.places:
            return False
        if argv[0] == "convert":
            return self._new(Path(argv[-1])) and step.writes == (Path(argv[-1]),)
        if argv[0] == "bitmap":
            return self._bitmap(step)
        if argv[0] == "create":
            return self._work((step.cwd or Path("/")) / argv[-2])
        if "--image-opts" in argv:
            # A pull into the target or the hard link to it: what is written to is named there.
            target = self.group.layers[self.group.target].path
            paths = [target, *(each.link for each in self._links(target))]
            names = [str(path).replace(",", ",,") for path in paths]
            named = any(f",file.filename={name}," in argv[-1] for name in names)
            return step.writes == (target,) and named
        return set(_images(argv)) <= set(step.writes)

    def _bitmap(self, step: Command) -> bool:
        """Bitmaps change in the group's own images and in work files, and nowhere else."""
        *words, dashes, image, name = step.argv
        sources = [Path(words[at + 1]) for at, word in enumerate(words[:-1]) if word == "-b"]
        flags = {"bitmap", "-f", "-F", "-b", "-g", "qcow2", "--remove", "--add", "--enable",
                 "--disable", f"--merge={name}"}  # fmt: skip
        flags |= {str(path) for path in sources}
        return (
            dashes == "--"
            and step.writes == (Path(image),)
            and (Path(image) in self.members or self._work(Path(image)))
            and all(path in self.chain or self._work(path) for path in sources)
            and all(word in flags or word.isdecimal() for word in words)
        )

    def _links(self, target: Path) -> Iterator[HardLink]:
        for step in self.group.steps:
            if isinstance(step, HardLink) and step.existing == target:
                yield step

    def _new(self, path: Path) -> bool:
        """The new file of a copy, in its work directory."""
        return self.group.copy is not None and path == self.group.goal.path and self._work(path)

    # --- names ---------------------------------------------------------------------

    def _beside(self, path: Path) -> bool:
        """A work file beside an image of the group."""
        return (
            path.parent in self.places
            and path.name.startswith(WORK_PREFIX)
            and not path.name.endswith(JOURNAL_SUFFIX)
        )

    def _work(self, path: Path) -> bool:
        """A work file: beside an image, or in a work directory there."""
        return path.name != ".." and (self._beside(path) or self._beside(path.parent))

    def _saved(self, path: Path, suffix: str = SAVED_SUFFIX) -> bool:
        """The further name that --keep-files gives to a replaced file, or to the manifest."""
        return any(
            path.parent == member.parent and path.name.startswith(member.name + suffix)
            for member in self.members
        )


def _images(argv: tuple[str, ...]) -> Iterator[Path]:
    """The images that commit, resize or `rebase -u` writes to, from the command line."""
    if argv[0] == "commit":
        yield Path(argv[argv.index("-b") + 1])
    yield Path(argv[-2] if argv[0] == "resize" else argv[-1])


def _well_typed(step: Step) -> bool:
    for field in fields(step):
        value = getattr(step, field.name)
        kinds = {
            **dict.fromkeys(("argv", "writes", "names", "gone"), tuple),
            "weight": int,
            "room": int,
            "commits": bool,
        }
        if isinstance(value, Path):
            if not value.is_absolute():
                return False
        elif not isinstance(value, kinds.get(field.name, str)) and (
            value is not None or field.name in kinds
        ):
            return False
    words: tuple[object, ...] = ()
    match step:
        case Command(argv):
            words = argv
        case ConfirmBitmaps(_, names, gone):
            words = names + gone
        case _:
            pass
    return all(isinstance(word, str) for word in words)
