"""The open gate: the caller, not the image, decides which files may be opened.

An image is data from outside: its backing name may point anywhere
(CVE-2024-4467, CVE-2024-32498). By default only files in the directory of the
image that the user named, and below the directories that the user allowed,
are opened. Symbolic links are judged by where they lead.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from qchain.errors import NotAllowed, UsageError
from qchain.hostfile import HostFile

__all__ = ["Gate", "Places"]


class Places:
    """Where names lead. Each directory is looked up once: for one opening, no longer."""

    def __init__(self) -> None:
        self._directories: dict[str, str] = {}
        self._own: dict[Path, frozenset[str]] = {}

    def real(self, path: Path) -> str:
        """As `os.path.realpath`."""
        head, name = os.path.split(path)
        if name in ("", os.curdir, os.pardir) or os.path.islink(path):  # noqa: PTH114
            return os.path.realpath(path)
        known = self._directories.get(head)
        if known is None:
            known = self._directories[head] = os.path.realpath(head)
        return os.path.join(known, name)  # noqa: PTH118

    def own(self, named: Path) -> frozenset[str]:
        """The directories that an image lies in: that of its name, and where that leads."""
        known = self._own.get(named)
        if known is None:
            real = os.path.dirname(os.path.realpath(named))  # noqa: PTH120
            known = self._own[named] = frozenset((os.path.realpath(named.parent), real))
        return known


@dataclass(frozen=True)
class Gate:
    """What may be opened.

    Attributes:
        allow: directories; everything below each may be opened.
        follow: trust the names that the images give.
        max_depth: longest chain that is followed.
        search: directories where backing files that are missing, or lie outside, are
            looked for by their file name (evidence copied from another machine).
        missing_zero: a backing file that is nowhere reads as zeroes.
        assume_format: format of backing files whose overlay does not record it
            (None: such a chain is an error; formats are never probed).
        secret: passphrase of the LUKS images of the chain; None: their maps can be read,
            their content cannot.
    """

    allow: tuple[str | os.PathLike[str], ...] = ()
    follow: bool = False
    max_depth: int = 4096
    search: tuple[str | os.PathLike[str], ...] = ()
    missing_zero: bool = False
    assume_format: str | None = None
    secret: bytes | None = field(default=None, repr=False)
    _roots: tuple[Path, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("allow", self.allow), ("search", self.search)):
            if isinstance(value, str):
                raise UsageError(name, "is one name, not several", f"give ({value!r},)")
        roots = tuple(Path(os.path.realpath(directory)) for directory in self.allow)
        object.__setattr__(self, "_roots", roots)

    def open_named(self, path: Path) -> HostFile:
        """Open a file that the user named."""
        return HostFile(path)

    def locate(self, path: Path, named: Path, places: Places | None = None) -> Path:
        """Where a file that an image refers to is: `path`, or of that name in `search`."""
        if self.search and not (self.permits(path, named, places) and _mode(path)):
            for directory in self.search:
                found = Path(directory) / path.name
                mode = _mode(found)
                if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                    return found
        return path

    def open_referenced(self, path: Path, named: Path, places: Places | None = None) -> HostFile:
        """Open a file that an image of the chain of `named` refers to.

        Args:
            places: what this opening has looked up already.

        Raises: `NotAllowed` when it leads outside of what may be opened.
        """
        if not self.permits(path, named, places):
            todo = f"if it belongs to the chain, add --allow {path.parent} (or --follow)"
            if stat.S_ISREG(_mode(named.parent / path.name)):
                todo += f"; {named.parent / path.name} is taken for it with --search {named.parent}"
            raise NotAllowed(
                path,
                f"an image of the chain of {named} names it, outside of what may be opened",
                todo,
            )
        return HostFile(path)

    def permits(self, path: Path, named: Path, places: Places | None = None) -> bool:
        """Whether `open_referenced` would let `path` be opened."""
        if self.follow:
            return True
        places = places or Places()
        real = places.real(path)
        directory = os.path.dirname(real)  # noqa: PTH120
        if directory in places.own(named):
            return True
        if any(directory == os.path.realpath(each) for each in self.search):
            return True
        return any(Path(real).is_relative_to(root) for root in self._roots)


def _mode(path: Path) -> int:
    """What `path` leads to, 0 where that is nothing (also for names that no file can have)."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0
