"""The command `qchain`: its commands, and every way it can end.

An error is one line on stderr, `qchain: <what>: <why>; <what to do>`, and an exit code
of `qchain.errors.ExitCode`. Tracebacks are for QCHAIN_DEBUG only. Whatever a command
needs it imports when it runs: `qchain --help` loads neither numpy nor construct nor rich.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
import typer.main

from qchain.errors import ExitCode, QchainError, Refused, printable

from .options import LATER, Interrupted
from .output import NotWritten, OutputClosed, forget_stdout, note, write, write_error

__all__ = ["main"]

# Nothing here multiplies matrices: numpy's library for that would start a thread per processor,
# which cost more than all else that is imported. Its importer reads this once.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# click's exceptions, or those of the copy of click that newer typers bring along.
_parsing = importlib.import_module(typer.BadParameter.__module__)

_CLOSED = 141
"""As a shell reports a process that SIGPIPE ended."""

_LATER = ("fleet", "lab")

_COMMANDS = {
    "info": "info",
    "chain": "chain",
    "map": "map.map_",
    "compare": "compare",
    "hash": "hash.hash_",
    "check": "check",
    "tree": "tree",
    "diff": "diff",
    "extract": "extract",
    "seal": "seal",
    "verify": "seal.verify",
    "leaks": "leaks",
    "report": "report",
    "plan": "plan",
    "merge": "merge",
    "apply": "apply",
    "commit": "blocks.commit",
    "pull": "blocks.pull",
    "copy": "blocks.copy",
    "rebase": "rebase",
    "snapshot": "snapshot",
    "recover": "recover",
}
"""The commands, in the order of the help, and the function that each is: the module, and its
name in there where that is another one."""

_GROUPS = {"domain": "domain"}
"""Commands of commands, and the module whose `app` each is."""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        write(f"qchain {version('qchain')}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def _app(wanted: str | None) -> typer.Typer:
    """The command line with the one command that is `wanted`, or with all of them.

    One is quicker: each has dozens of options, which take longer to declare than to use.
    """
    app = typer.Typer(
        name="qchain",
        help="Offline toolkit for qcow2 backing chains: read, plan, merge, verify.",
        add_completion=False,
        no_args_is_help=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    if wanted in _GROUPS:
        _add_group(app, wanted)
        return app
    for name in [wanted] if wanted in _COMMANDS else _COMMANDS:
        module, _, function = _COMMANDS[name].partition(".")
        found = importlib.import_module(f".{module}", __package__)
        app.command(name)(getattr(found, function or module))
    if wanted not in _COMMANDS:
        for name in _GROUPS:
            _add_group(app, name)
        for name in _LATER:
            _add_refusal(app, name)
    return app


def _add_group(app: typer.Typer, name: str) -> None:
    app.add_typer(importlib.import_module(f".{_GROUPS[name]}", __package__).app, name=name)


def _add_refusal(app: typer.Typer, name: str) -> None:
    @app.command(
        name,
        hidden=True,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def refuse() -> None:
        raise Refused(name, LATER, "see 'qchain --help' for what there is")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` without `arguments`); returns the exit code."""
    # Of what is imported nothing is garbage: looking for it, at the start and once more at
    # the end, costs a sixth of a small command's time.
    gc.set_threshold(200_000, 50, 1000)
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks must not be an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(None if arguments is None else list(arguments))
    except OutputClosed:
        forget_stdout()
        return _CLOSED
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        # What was interrupted says what is left, where that matters.
        write_error(": ".join(["qchain: interrupted", *(printable(each) for each in error.args)]))
        return ExitCode.INTERRUPTED
    except QchainError as error:
        if isinstance(error, NotWritten):
            forget_stdout()
        write_error(f"qchain: {error}")
        return error.exit_code
    except _parsing.ClickException as error:
        note(_usage_line(error))
        return ExitCode.USAGE
    except Exception as error:
        if isinstance(error, OSError) and _of_storage(error) and not _debugging():
            # Merging turns its own into FailedMidway: nothing has been changed here.
            what = "storage" if error.filename is None else error.filename
            note(f"{what}: {(error.strerror or str(error)).lower()}; check it and retry")
            return ExitCode.INVALID
        if _debugging():
            raise
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        note(f"internal error: {what}; set QCHAIN_DEBUG=1 for the details and report it")
        return ExitCode.FAILED


def _of_storage(error: OSError) -> bool:
    """Whether it is an error of a file, or of what all files lie on, and not one of ours."""
    return error.filename is not None or error.errno in (errno.EIO, errno.ENODEV, errno.ESTALE)


def _debugging() -> bool:
    return bool(os.environ.get("QCHAIN_DEBUG"))


def _run(arguments: list[str] | None) -> int:
    if arguments is None:
        arguments = sys.argv[1:]
    app = _app(arguments[0] if arguments else None)
    result = typer.main.get_command(app).main(arguments, prog_name="qchain", standalone_mode=False)
    return result if isinstance(result, int) else ExitCode.DONE


def _usage_line(error: Exception) -> str:
    """What the parser complains of, in the shape of all our errors."""
    why = " ".join(_parsing.ClickException.format_message(error).split()).rstrip(".")
    with contextlib.suppress(Exception):
        why = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", None) or "qchain"
    what = path.removeprefix("qchain").strip() or "command line"
    return f"{what}: {why}; see '{path} --help'"
