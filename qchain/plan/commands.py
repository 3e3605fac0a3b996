"""The qemu-img command lines that qchain uses: pure, so that a dry run prints what a merge runs.

Facts behind them (measured with 7.2): a plain `rebase` is not crash-safe, `commit
-b` implies `-d`, and a header name is resolved from the text of the overlay's name,
never from its real path. A merge holds the locks of the image that a command names
itself, and says so to qemu-img (`unlocked_argv`); by hand qemu-img takes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from qchain.qcow2.header import Header

__all__ = [
    "EMPTY_CLUSTER",
    "bitmap_merge_argv",
    "bitmap_remove_argv",
    "commit_argv",
    "convert_argv",
    "create_empty_argv",
    "creation_options",
    "empty_image_bytes",
    "image_opts",
    "rebase_plain_argv",
    "rebase_safe_argv",
    "rebase_unsafe_argv",
    "rebase_writethrough_argv",
    "resize_shrink_argv",
    "safe_name",
    "unlocked_argv",
]


EMPTY_CLUSTER = 65536
"""Bytes of a cluster of what `create_empty_argv` makes."""


def safe_name(name: str | Path) -> str:
    """`name` so that qemu-img takes it for a file: neither an option nor a protocol.

    A relative name with a colon or a leading dash goes behind './'.
    """
    text = _not_a_protocol(os.fspath(name))
    return f"./{text}" if text.startswith("-") else text


def _not_a_protocol(name: str) -> str:
    return f"./{name}" if ":" in name.partition("/")[0] else name


def image_opts(options: Mapping[str, str | Path]) -> str:
    """The argument of --image-opts: `key=value,...`, commas in values doubled."""
    return ",".join(f"{key}={os.fspath(v).replace(',', ',,')}" for key, v in options.items())


def commit_argv(base: str | Path, top: str | Path, top_format: str = "qcow2") -> list[str]:
    """Write what lies above `base`, up to `top`, into `base`; `top` keeps its data.

    `base` by an absolute name: qemu matches it by real path. -b implies -d, said
    here so that a reader need not know it. The base's format is what its overlay
    records.
    """
    return ["commit", "-p", "-d", "-f", top_format, "-b", safe_name(base), safe_name(top)]


def rebase_unsafe_argv(
    image: str | Path,
    image_format: str,
    backing: str | Path | None,
    backing_format: str | None = None,
) -> list[str]:
    """Write only the header: `image` backs on `backing` (None: on nothing) from now on."""
    argv = ["rebase", "-u", "-f", image_format]
    return [*argv, *_backing_arguments(backing, backing_format), safe_name(image)]


def rebase_writethrough_argv(
    image: str | Path,
    image_format: str,
    backing: str | Path | None,
    backing_format: str | None = None,
) -> list[str]:
    """A pull in one command, for where the two-phase pull is impossible.

    Writethrough orders the L2 tables before the header, at about four times the time.
    """
    # With lazy refcounts no flush stands between a cluster and the table that names it.
    options = {"driver": image_format, "file.filename": image, "lazy-refcounts": "off"}
    argv = ["rebase", "-p", "-t", "writethrough", "--image-opts"]
    return [*argv, *_backing_arguments(backing, backing_format), image_opts(options)]


def rebase_safe_argv(
    link: str | Path, alias: str, present: str | Path | None, present_format: str | None
) -> list[str]:
    """The first phase of a two-phase pull; to be run with `cwd` = the image's directory.

    `link`: the hard link to the image, `WORK/image`, absolute (qemu looks for the new
    backing in the chain by names made absolute from it).
    `alias`: a bare name, found in WORK (there it is the new backing) and beside the
    image (there it is a qcow2 overlay, empty, of the image's present backing).
    `present`: the backing name exactly as the image's header has it. qemu resolves
    `-b` from the image's name only while the backing is not overridden, and by
    `bdrv_backing_overridden` it is not when the strings are equal; hence the
    verbatim name and the working directory from which it is right. None: it has none.

    -F is the format of the alias *beside the image*, for it goes into the header.
    A new backing found in the chain is never opened by it, so it may be raw; one
    outside the chain must be put behind an empty qcow2 overlay.
    """
    options: dict[str, str | Path] = {
        "driver": "qcow2",
        "file.filename": link,
        # With lazy refcounts nothing makes qemu flush a pulled cluster before the L2
        # table that names it: power loss would leave the table without the data.
        "lazy-refcounts": "off",
    }
    if present is not None and present_format is not None:
        # No file.driver: qemu tells files from block devices itself, and does
        # not look for protocol prefixes in an option's value.
        options |= {"backing.driver": present_format, "backing.file.filename": present}
    return ["rebase", "-p", "--image-opts", "-b", alias, "-F", "qcow2", image_opts(options)]


def rebase_plain_argv(
    image: str | Path, image_format: str, backing: str | Path, backing_format: str
) -> list[str]:
    """A pull into an image that nobody has yet: what a stop leaves of it is thrown away."""
    argv = ["rebase", "-p", "-f", image_format]
    return [*argv, *_backing_arguments(backing, backing_format), safe_name(image)]


def convert_argv(
    source: str | Path,
    source_format: str,
    out: str | Path,
    options: str = "",
    backing: str | Path | None = None,
    backing_format: str | None = None,
) -> list[str]:
    """A new image with the content of `source`, in its format.

    With a backing file only what `source` itself allocates is copied, whatever that
    backing file is: it must be the one that `source` has. `-t`: the default flushes nothing.
    """
    argv = ["convert", "-p", "-t", "writeback", "-f", source_format, "-O", source_format]
    if options:
        argv += ["-o", options]
    if backing is not None:
        if backing_format is None:
            raise ValueError("a backing file's format is always said, never probed")
        argv += ["-B", _not_a_protocol(os.fspath(backing)), "-F", backing_format]
    return [*argv, safe_name(source), safe_name(out)]


def creation_options(header: Header | None) -> str:
    """The -o of a new image with the features of one that has `header` (None: raw)."""
    if header is None:
        return ""
    options = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "cluster_size": str(header.cluster_size),
        "refcount_bits": str(header.refcount_bits),
    }
    if header.version > 2:
        options["lazy_refcounts"] = "on" if header.lazy_refcounts else "off"
        options["extended_l2"] = "on" if header.extended_l2 else "off"
        options["compression_type"] = header.compression
    return image_opts(options)


def empty_image_bytes(size: int) -> int:
    """What `create_empty_argv` makes: header, refcount table and block, L1 table of 8 bytes for
    each 512 MiB."""
    l1 = -(-size // (EMPTY_CLUSTER * EMPTY_CLUSTER // 8)) * 8
    return EMPTY_CLUSTER * (3 + -(-max(l1, 1) // EMPTY_CLUSTER))


def create_empty_argv(
    path: str | Path,
    size: int,
    backing: str | Path | None = None,
    backing_format: str | None = None,
) -> list[str]:
    """A new qcow2 image of `size` bytes that allocates nothing.

    -u: the backing file is not opened. Without it, creation would open the chain.
    """
    argv = ["create", "-q", "-f", "qcow2"]
    if backing is not None:
        argv += ["-u", *_backing_arguments(backing, backing_format)]
    return [*argv, safe_name(path), str(size)]


def resize_shrink_argv(image: str | Path, image_format: str, size: int) -> list[str]:
    """Cut `image` to `size` bytes: after a commit of a shorter top."""
    return ["resize", "-q", "--shrink", "-f", image_format, safe_name(image), str(size)]


def check_leaks_argv(image: str | Path) -> list[str]:
    """Free the clusters of `image` that nothing refers to."""
    return ["check", "-q", "-r", "leaks", "-f", "qcow2", safe_name(image)]


def bitmap_remove_argv(image: str | Path, name: str) -> list[str]:
    """Remove the bitmap `name`; one that is in use may be removed too."""
    return ["bitmap", "-f", "qcow2", "--remove", "--", safe_name(image), name]


def bitmap_merge_argv(
    image: str | Path,
    name: str,
    source: str | Path,
    new: tuple[int, bool] | None = None,
    remove: bool = False,
) -> list[str]:
    """Add what the bitmap `name` of `source` marks to that of `image`, of an equally long disk.

    `new`: it is made first, of this granularity (bytes), recording or not; with `remove`
    in place of one of this name. qemu does these in the order given, in one opening.
    """
    argv = ["bitmap", "-f", "qcow2"]
    if new is not None:
        granularity, auto = new
        argv += ["--remove"] if remove else []
        argv += ["--add", "-g", str(granularity), "--enable" if auto else "--disable"]
    # Joined, so that a name with a leading dash is none of an option.
    argv += [f"--merge={name}", "-b", safe_name(source), "-F", "qcow2"]
    return [*argv, "--", safe_name(image), name]


def unlocked_argv(argv: Sequence[str]) -> list[str]:
    """The same commit, rebase, resize or bitmap, taking no locks on the image that it names.

    For who holds a writer's locks on it, so that nobody gets in before qemu-img and after it.
    """
    out = list(argv)
    place = -2 if out[0] in ("resize", "bitmap") else -1
    if "--image-opts" in out:
        out[place] += ",file.locking=off"
        return out
    at = out.index("-f")
    options = {"driver": out[at + 1], "file.filename": out[place], "file.locking": "off"}
    out[place] = image_opts(options)
    out[at : at + 2] = ["--image-opts"]
    return out


def _backing_arguments(backing: str | Path | None, backing_format: str | None) -> list[str]:
    if backing is None:
        return ["-b", ""]
    if backing_format is None:
        raise ValueError("a backing file's format is always said, never probed")
    # What -b says goes into the header verbatim. It is an option's value, so that a
    # leading dash needs nothing.
    return ["-b", _not_a_protocol(os.fspath(backing)), "-F", backing_format]
