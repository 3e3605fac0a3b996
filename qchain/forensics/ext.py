"""The files of an ext2, ext3 or ext4 filesystem in a raw file, listed without mounting it.

debugfs does the reading. Its listing prints names as they are, and a crafted name could forge
lines; so the directories are dumped and taken apart here, and between the descriptions of two
inodes stands a random word that no image can know.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qchain.forensics.tools import ToolFailed, run_tool

__all__ = ["ExtTree", "Inode", "dump_inodes", "read_tree"]

MAX_FILES = 300_000
_ROOT = 2
_DIRECTORY = 2
_CHUNK = 4000
_INLINE = 0x10000000
_EXTENT = re.compile(rb"\((\d+)(\[u\])?(?:-(\d+)(?:\[u\])?)?\):(\d+)(?:-(\d+))?")
_HEAD = re.compile(
    rb"Inode: (\d+) +Type: ([a-z A-Z]+?) +Mode: +(\d+) +Flags: 0x([0-9a-f]+)\n", re.MULTILINE
)
_OWNER = re.compile(rb"^User: +(\d+) +Group: +(\d+).* Size: (\d+)$", re.MULTILINE)
_LINKS = re.compile(rb"^Links: (\d+) ", re.MULTILINE)
_TIME = re.compile(rb"^ *([cm])time: 0x([0-9a-f]+)(?::([0-9a-f]+))? --", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Inode:
    """What debugfs says of an inode. `size` in bytes; `extents` as (logical, physical, count)
    in filesystem blocks, unwritten ones left out (they read as zeroes)."""

    number: int
    type: str
    mode: int
    flags: int
    uid: int
    gid: int
    size: int
    links: int
    mtime: str
    ctime: str
    target: bytes
    extents: tuple[tuple[int, int, int], ...]

    @property
    def inline(self) -> bool:
        """Its content lies within the inode."""
        return bool(self.flags & _INLINE)


@dataclass
class ExtTree:
    """`paths`: every name, from the root, to its inode number. `notes`: what was odd."""

    block_size: int
    paths: dict[bytes, int] = field(default_factory=dict)
    inodes: dict[int, Inode] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_tree(raw: Path, offset: int) -> ExtTree:
    """All files of the filesystem that starts at byte `offset` of `raw`.

    Temporary files go beside `raw`, and are removed.

    Raises: `ToolFailed`, with a sentence why it cannot be listed.
    """
    with raw.open("rb") as stream:
        stream.seek(offset + 1024)
        superblock = stream.read(1024)
    log_size, incompatible = struct.unpack_from("<I68xI", superblock, 24)
    if log_size > 6:
        raise ToolFailed("its superblock is damaged")
    tree = ExtTree(1024 << log_size)
    if not incompatible & 2:
        raise ToolFailed("it is an old ext2, whose directories do not say what is a directory")
    if incompatible & 4:
        tree.notes.append("the journal was not replayed: the filesystem was in use")
    where = _where(raw, offset)
    _walk(raw.parent, where, tree)
    numbers = sorted({_ROOT, *tree.paths.values()})
    for low in range(0, len(numbers), _CHUNK):
        for inode in _describe(raw.parent, where, numbers[low : low + _CHUNK]):
            tree.inodes[inode.number] = inode
    if _ROOT not in tree.inodes:
        raise ToolFailed("debugfs cannot read its root directory")
    return tree


def dump_inodes(raw: Path, offset: int, numbers: Sequence[int]) -> dict[int, bytes]:
    """The content of inodes whose data lies within them (at most a few hundred bytes each)."""
    out: dict[int, bytes] = {}
    for low in range(0, len(numbers), _CHUNK):
        out.update(_dump(raw.parent, _where(raw, offset), numbers[low : low + _CHUNK]))
    return out


def _where(raw: Path, offset: int) -> str:
    # libext2fs takes options after a question mark.
    return f"{raw.name}?offset={offset}"


def _debugfs(directory: Path, where: str, commands: Sequence[str]) -> bytes:
    script = directory / "commands"
    script.write_text("".join(f"{line}\n" for line in commands), "ascii")
    # -c: nothing but what is asked for is read, so that damage elsewhere does not matter.
    done = run_tool("debugfs", ["-c", "-f", script.name, where], directory)
    script.unlink()
    if b"while trying to open" in done.stderr or b"Filesystem not open" in done.stderr:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ToolFailed(f"debugfs cannot open it: {reason[-1] if reason else 'unknown reason'}")
    return done.stdout


def _dump(directory: Path, where: str, numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    _debugfs(directory, where, [f"dump <{number}> dump.{number}" for number in numbers])
    for number in numbers:
        path = directory / f"dump.{number}"
        if path.exists():
            yield number, path.read_bytes()
            path.unlink()


def _walk(directory: Path, where: str, tree: ExtTree) -> None:
    """Fill `tree.paths`, one level of directories after the other."""
    level = {_ROOT: b""}
    seen = {_ROOT}
    while level:
        below: dict[int, bytes] = {}
        numbers = list(level)
        for low in range(0, len(numbers), _CHUNK):
            for number, data in _dump(directory, where, numbers[low : low + _CHUNK]):
                for inode, name, kind in _entries(data, tree):
                    path = level[number] + b"/" + name
                    tree.paths[path] = inode
                    if kind == _DIRECTORY and inode not in seen:
                        seen.add(inode)
                        below[inode] = path
                if len(tree.paths) > MAX_FILES:
                    raise ToolFailed(f"it holds more than {MAX_FILES} files")
        level = below


def _entries(data: bytes, tree: ExtTree) -> Iterator[tuple[int, bytes, int]]:
    """(inode, name, type) of a directory's entries, without '.' and '..'.

    Source: the kernel's ext4 documentation, "Linear (Classic) Directories"; the blocks of a
    hash tree look like unused entries here.
    """
    size = tree.block_size
    # A directory within its inode: its parent's number, entries, and more in an attribute.
    spans = [(4, 60), (60, len(data))] if len(data) % size else []
    spans = spans or [(low, low + size) for low in range(0, len(data), size)]
    for position, end in spans:
        while position + 8 <= min(end, len(data)):
            inode, length, name_length, kind = struct.unpack_from("<IHBB", data, position)
            if length in (0, 0xFFFF) and size == 65536:
                length = 65536
            if length < 8 or length % 4 or position + 8 + name_length > end:
                if inode and name_length:
                    tree.notes.append("a directory is damaged: part of it is not listed")
                break
            name = data[position + 8 : position + 8 + name_length]
            if inode and name_length and name not in (b".", b".."):
                yield inode, name, kind
            position += length


def _describe(directory: Path, where: str, numbers: Sequence[int]) -> Iterator[Inode]:
    word = f"END-{secrets.token_hex(16)}"
    commands = [line for number in numbers for line in (f"stat <{number}>", word)]
    text = _debugfs(directory, where, commands)
    for number, section in zip(
        numbers, text.split(f"debugfs: {word}\n".encode("ascii")), strict=False
    ):
        found = _parse(number, section)
        if found is not None:
            yield found


def _parse(number: int, section: bytes) -> Inode | None:
    """One inode; None when debugfs could not read it. What the image names comes last."""
    head, owner = _HEAD.search(section), _OWNER.search(section)
    links = _LINKS.search(section)
    if head is None or owner is None or links is None or int(head[1]) != number:
        return None
    times: dict[bytes, str] = {}
    for name, seconds, fraction in _TIME.findall(section):
        times.setdefault(name, os.fsdecode(seconds + (b":" + fraction if fraction else b"")))
    link, target = b"", b""
    if head[2] == b"symlink":
        _, link, target = section.partition(b'\nFast link dest: "')
    extents: list[tuple[int, int, int]] = []
    if not link:
        # The last such heading is the real one: attributes come before it.
        at = max(section.rfind(b"\nEXTENTS:\n"), section.rfind(b"\nBLOCKS:\n"))
        if at >= 0:
            for low, unwritten, high, block, _ in _EXTENT.findall(section, at):
                if not unwritten:
                    extents.append((int(low), int(block), int(high or low) - int(low) + 1))
    return Inode(
        number=number,
        type=head[2].decode("ascii"),
        mode=int(head[3], 8),
        flags=int(head[4], 16),
        uid=int(owner[1]),
        gid=int(owner[2]),
        size=int(owner[3]),
        links=int(links[1]),
        mtime=times.get(b"m", ""),
        ctime=times.get(b"c", ""),
        target=target[:-2] if link else b"",
        extents=tuple(extents),
    )
