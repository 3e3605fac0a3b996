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

__all__ = ["Gate"]


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

    def locate(self, path: Path, named: Path) -> Path:
        """Where a file that an image refers to is: `path`, or of that name in `search`."""
        if self.search and not (self.permits(path, named) and _mode(path)):
            for directory in self.search:
                found = Path(directory) / path.name
                mode = _mode(found)
                if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                    return found
        return path

    def open_referenced(self, path: Path, named: Path) -> HostFile:
        """Open a file that an image of the chain of `named` refers to.

        Raises: `NotAllowed` when it leads outside of what may be opened.
        """
        if not self.permits(path, named):
            todo = f"if it belongs to the chain, add --allow {path.parent} (or --follow)"
            if stat.S_ISREG(_mode(named.parent / path.name)):
                todo += f"; {named.parent / path.name} is taken for it with --search {named.parent}"
            raise NotAllowed(
                path,
                f"an image of the chain of {named} names it, outside of what may be opened",
                todo,
            )
        return HostFile(path)

    def permits(self, path: Path, named: Path) -> bool:
        """Whether `open_referenced` would let `path` be opened."""
        if self.follow:
            return True
        real = Path(os.path.realpath(path))
        own = {Path(os.path.realpath(named.parent)), Path(os.path.realpath(named)).parent}
        if any(real.parent == Path(os.path.realpath(each)) for each in self.search):
            return True
        return real.parent in own or any(real.is_relative_to(root) for root in self._roots)


def _mode(path: Path) -> int:
    """What `path` leads to, 0 where that is nothing (also for names that no file can have)."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0
