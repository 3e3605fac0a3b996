"""The options that several commands share, as groups.

A command takes a group as one parameter; `command` shows its fields to typer as
options of their own. Nothing heavy is imported here: `qchain --help` must be quick.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from qchain.errors import Refused, UsageError
from qchain.plan.options import ENGINES, NAMES, PREFER, STRATEGIES, VERIFY, one_of

from .output import OutputClosed, note

if TYPE_CHECKING:
    from qchain.chain.gate import Gate

    from .progress import Reporter

__all__ = ["Common", "Interrupted", "Merging", "Point", "command"]

LATER = "comes with a later version"
_MAX_SECRET = 1 << 20


class Interrupted(BaseException):
    """KeyboardInterrupt under a name that the option parser leaves alone.

    What it leaves is said by its arguments; without them nothing is said.
    """


@dataclass(frozen=True)
class Common:
    """The options of every command that reads images."""

    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False
    allow: Annotated[
        list[Path] | None,
        typer.Option(
            "--allow",
            metavar="DIR",
            help="Backing files below DIR may be opened too (repeatable; also QCHAIN_ALLOW).",
        ),
    ] = None
    follow: Annotated[
        bool, typer.Option("--follow", help="Trust the file names that the images give.")
    ] = False
    force_share: Annotated[
        bool,
        typer.Option("--force-share", "-U", help="Read an image that is in use."),
    ] = False
    format: Annotated[
        str | None,
        typer.Option("--format", "-f", metavar="FMT", help="Format of the image: qcow2 or raw."),
    ] = None
    assume_format: Annotated[
        str | None,
        typer.Option(
            "--assume-format",
            metavar="FMT",
            help="Format of backing files where none is recorded.",
        ),
    ] = None
    progress: Annotated[
        str,
        typer.Option(
            "--progress",
            metavar="HOW",
            help="auto (a bar, on a terminal), json (events on stderr) or none.",
        ),
    ] = "auto"
    search: Annotated[
        list[Path] | None,
        typer.Option(
            "--search",
            metavar="DIR",
            help="Look for missing backing files here, by their file name (repeatable).",
        ),
    ] = None
    missing: Annotated[
        str | None,
        typer.Option("--missing", metavar="zero", help="A backing file that is nowhere is zeroes."),
    ] = None
    secret_file: Annotated[
        Path | None,
        typer.Option(
            "--secret-file",
            metavar="FILE",
            help="The passphrase of LUKS images: all of FILE, a newline at its end too.",
        ),
    ] = None

    def check(self) -> None:
        """Raises `UsageError` for impossible values."""
        for option, value, possible in (
            ("--assume-format", self.assume_format, (None, "qcow2", "raw")),
            ("--missing", self.missing, (None, "zero")),
            ("--progress", self.progress, ("auto", "json", "none")),
        ):
            if value not in possible:
                one_of = ", ".join(each for each in possible if each is not None)
                raise UsageError(option, f"{value!r} is not possible", f"one of: {one_of}")
        for directory in self.search or ():
            if not directory.is_dir():
                raise UsageError(directory, "is no directory", "give --search a directory")

    def gate(self) -> Gate:
        """The open gate that these options describe. Reads the secret, which may be a pipe.

        Raises: `UsageError` when the secret cannot be read.
        """
        from qchain.chain.gate import Gate

        for directory in self.allow or ():
            if not directory.is_dir():
                note(f"{directory}: is no directory, so --allow lets nothing be opened there")
        named = [Path(name) for name in os.environ.get("QCHAIN_ALLOW", "").split(":") if name]
        return Gate(
            allow=(*(self.allow or ()), *named),
            follow=self.follow,
            search=tuple(self.search or ()),
            missing_zero=self.missing == "zero",
            assume_format=self.assume_format,
            secret=None if self.secret_file is None else _secret(self.secret_file),
        )

    def reporter(self) -> Reporter:
        """Where progress goes; a context manager."""
        from .progress import Reporter

        return Reporter(self.progress)


def _secret(path: Path) -> bytes:
    """The whole file, as qemu takes it. Raises `UsageError` when it is none."""
    try:
        with path.open("rb") as file:
            secret = file.read(_MAX_SECRET + 1)
    except (OSError, ValueError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise UsageError(path, why, "give --secret-file a file that can be read") from None
    if len(secret) > _MAX_SECRET:
        raise UsageError(path, f"is longer than {_MAX_SECRET} bytes", "name the right file")
    return secret


@dataclass(frozen=True)
class Point(Common):
    """The options of commands that read one point, which may be an internal snapshot."""

    snapshot: Annotated[
        str | None,
        typer.Option(
            "--snapshot",
            metavar="NAME",
            help="This internal snapshot (name or id) instead of the live content.",
        ),
    ] = None


Engine = Annotated[
    str, typer.Option("--engine", metavar="WHO", help=f"Who writes: {one_of(ENGINES)}.")
]


@dataclass(frozen=True)
class Carrying:
    """The options of every command that merges: how it is done."""

    engine: Engine = "auto"
    scan: Annotated[
        list[Path] | None,
        typer.Option("--scan", metavar="DIR", help="Look here for other overlays (repeatable)."),
    ] = None
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Read and compare contents while planning: exact figures where they repeat, too.",
        ),
    ] = False
    keep_files: Annotated[bool, typer.Option("--keep-files", help="Delete nothing.")] = False
    verify: Annotated[str, typer.Option("--verify", metavar="MODE", help=f"{one_of(VERIFY)}.")] = (
        "moved"
    )
    bitmaps: Annotated[
        str,
        typer.Option(
            "--bitmaps",
            metavar="WHAT",
            help="Bitmaps in images that vanish: refuse, carry (into the result) or drop.",
        ),
    ] = "refuse"
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands, change nothing.")
    ] = False
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Save the plan as JSON.")
    ] = None
    # Known, to be refused in words.
    snapshot: Annotated[str | None, typer.Option("--snapshot", metavar="NAME", hidden=True)] = None

    def refuse(self, common: Common) -> None:
        """Raises `Refused` for options that only reading has."""
        for option, given, why, todo in (
            ("--snapshot", self.snapshot, "an internal snapshot cannot be merged", "leave it out"),
            (
                "--secret-file",
                common.secret_file,
                "encrypted images cannot be merged",
                "decrypt them with 'qemu-img convert'",
            ),
            (
                "--missing",
                common.missing,
                "what is missing cannot be merged",
                "find it, or record another backing file with 'qemu-img rebase -u'",
            ),
            (
                "--search",
                common.search or None,
                "a merge needs every image where its overlay says it is",
                "record its place with 'qemu-img rebase -u'",
            ),
        ):
            # An empty name is a request too.
            if given is not None:
                raise Refused(option, why, todo)


@dataclass(frozen=True)
class Merging(Carrying):
    """The options of plan and merge: what goes, and how."""

    drop: Annotated[
        list[str] | None,
        typer.Option("--drop", metavar="NAME", help="Drop this point (repeatable)."),
    ] = None
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="NAME", help="Drop all but these and the active one."),
    ] = None
    flatten: Annotated[bool, typer.Option("--flatten", help="Drop all below.")] = False
    collapse: Annotated[
        bool, typer.Option("--collapse", help="Drop all but the base and the active one.")
    ] = False
    strategy: Annotated[
        str,
        typer.Option("--strategy", metavar="HOW", help=f"{one_of(STRATEGIES)}."),
    ] = "auto"
    names: Annotated[
        str,
        typer.Option("--names", metavar="POLICY", help=f"The name of the result: {one_of(NAMES)}."),
    ] = "kept"
    prefer: Annotated[str, typer.Option("--prefer", metavar="WHAT", help=f"{one_of(PREFER)}.")] = (
        "time"
    )
    allow_format_change: Annotated[
        bool,
        typer.Option("--allow-format-change", help="The kept name may become a raw image."),
    ] = False


_GROUPS = (Common, Point, Carrying, Merging)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make `function` a command: typer sees the fields of its option groups.

    Also turns what the option parser would handle in its own way (interrupts, a
    closed pipe) into exceptions of ours.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if hint in _GROUPS}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            continue
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(parameter.replace(annotation=hints[name], kind=kind))
    for group in groups.values():
        fields = get_type_hints(group, include_extras=True)
        for name, parameter in inspect.signature(group).parameters.items():
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=fields[name], kind=kind))

    @functools.wraps(function)
    def wrapper(**values: Any) -> None:
        filled = {
            name: group(
                **{field: values.pop(field) for field in inspect.signature(group).parameters}
            )
            for name, group in groups.items()
        }
        try:
            for group in filled.values():
                if isinstance(group, Common):
                    group.check()
            function(**values, **filled)
        except KeyboardInterrupt as error:
            raise Interrupted(*(error.args or ("nothing was changed",))) from None
        except BrokenPipeError:
            raise OutputClosed from None

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper
