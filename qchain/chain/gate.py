"""The open gate: the caller, not the image, decides which files may be opened.

An image is data from outside: its backing name may point anywhere
(CVE-2024-4467, CVE-2024-32498). By default only files in the directory of the
image that the user named, and below the directories that the user allowed,
are opened. Symbolic links are judged by where they lead.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from qchain.errors import ImageError, NotAllowed, Unsupported
from qchain.hostfile import HostFile

__all__ = ["Gate", "resolve_name"]


@dataclass(frozen=True)
class Gate:
    """What may be opened.

    Attributes:
        allow: directories; everything below each may be opened.
        follow: trust the names that the images give.
        max_depth: longest chain that is followed.
        assume_format: format of backing files whose overlay does not record it
            (None: such a chain is an error; formats are never probed).
    """

    allow: tuple[Path, ...] = ()
    follow: bool = False
    max_depth: int = 4096
    assume_format: str | None = None
    _roots: tuple[Path, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        roots = tuple(Path(os.path.realpath(directory)) for directory in self.allow)
        object.__setattr__(self, "_roots", roots)

    def open_named(self, path: Path) -> HostFile:
        """Open a file that the user named."""
        return HostFile(path)

    def open_referenced(self, path: Path, named: Path) -> HostFile:
        """Open a file that an image of the chain of `named` refers to.

        Raises: `NotAllowed` when it leads outside of what may be opened.
        """
        if not self.permits(path, named):
            raise NotAllowed(
                path,
                f"an image of the chain of {named} names it, outside of what may be opened",
                f"if it belongs to the chain, add --allow {path.parent} (or --follow)",
            )
        return HostFile(path)

    def permits(self, path: Path, named: Path) -> bool:
        """Whether `open_referenced` would let `path` be opened."""
        if self.follow:
            return True
        real = Path(os.path.realpath(path))
        own = {Path(os.path.realpath(named.parent)), Path(os.path.realpath(named)).parent}
        return real.parent in own or any(real.is_relative_to(root) for root in self._roots)


def resolve_name(name: str, overlay: Path) -> Path:
    """The path that a backing name of `overlay` means.

    As qemu's `bdrv_get_full_backing_filename_from_filename`: an absolute name is
    itself, a relative one counts from the directory of the overlay's name (not of
    where a link leads).

    Raises: `Unsupported` for protocol names, `ImageError` for impossible ones.
    """
    if name.startswith("json:"):
        raise Unsupported(overlay, "a 'json:' backing name is not supported yet")
    head = name.split("/", 1)[0]
    if ":" in head:
        protocol = head.split(":", 1)[0]
        raise Unsupported(
            overlay,
            f"backing name {name!r} has the protocol {protocol!r}; only local files are read",
            "if it is a plain file name, record it as './NAME' or as an absolute path",
        )
    if not name or "\0" in name:
        raise ImageError(overlay, "its backing name is not a possible file name")
    return overlay.parent / name
