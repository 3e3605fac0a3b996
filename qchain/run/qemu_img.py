"""Run qemu-img: one careful way (the command lines themselves: `qchain.plan.commands`)."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qchain.errors import FailedMidway, ImageError

__all__ = [
    "QemuImg",
    "QemuImgError",
]

_STDERR_LIMIT = 64 * 1024  # bytes kept; a hostile image must not fill our memory
_STDOUT_LIMIT = 64 * 1024 * 1024
_INFO_ADDRESS_SPACE = 1 << 30  # bytes; what OpenStack allows after CVE-2024-32498
_INFO_VERBS = frozenset({"info", "map", "measure"})
_PROGRESS = re.compile(rb"\(\s*(\d+(?:\.\d+)?)/100%\)")
_COMPLAINT = re.compile(r"failed to flush|\berror\b", re.IGNORECASE)
_WATCH_EVERY = 0.5  # seconds
_KILL_AFTER = 1.0  # seconds between TERM and KILL


class QemuImgError(FailedMidway):
    """qemu-img ended with an error: `verb`, `status` (negative: the signal), `detail`."""

    def __init__(self, verb: str, status: int, detail: str) -> None:
        ended = f"killed by signal {-status}" if status < 0 else f"exit code {status}"
        super().__init__(f"qemu-img {verb}", f"{detail} ({ended})" if detail else ended)
        self.verb = verb
        self.status = status
        self.detail = detail


class QemuImg:
    """The qemu-img to use: `program`, else $QCHAIN_QEMU_IMG, else the one in PATH."""

    def __init__(self, program: str | Path | None = None) -> None:
        name = os.fspath(program or os.environ.get("QCHAIN_QEMU_IMG") or "qemu-img")
        found = shutil.which(name)
        if found is None:
            raise ImageError(
                name, "not found or not executable", "install qemu-utils or set QCHAIN_QEMU_IMG"
            )
        # Absolute: a command may run in another directory.
        self.program = str(Path(found).absolute())

    def version(self) -> tuple[int, int, int]:
        """Major, minor, micro. Raises `ImageError` when the program is no qemu-img."""
        text = self.read(["--version"])
        match = re.match(r"qemu-img version (\d+)\.(\d+)(?:\.(\d+))?", text)
        if match is None:
            raise ImageError(self.program, "does not say its version", "set QCHAIN_QEMU_IMG")
        major, minor, micro = match.groups(default="0")
        return int(major), int(minor), int(micro)

    def read(self, argv: Sequence[str], cwd: str | Path | None = None) -> str:
        """What a reading command prints. Raises `ImageError` when it fails."""
        status, output, errors = self._execute(argv, None, cwd)
        if status != 0:
            raise ImageError(f"qemu-img {argv[0]}", _first(errors) or f"exit code {status}")
        return output.decode("utf-8", "surrogateescape")

    def run(
        self,
        argv: Sequence[str],
        progress: Callable[[float], None] | None = None,
        cwd: str | Path | None = None,
        pass_fds: Sequence[int] = (),
        watch: Callable[[], None] | None = None,
    ) -> None:
        """Run `qemu-img *argv` to its end; `progress` hears fractions 0..1 of -p.

        `watch` is called twice a second, and ends it by raising.

        The child has the descriptors `pass_fds`, and any locks on them, as its own.

        Raises `QemuImgError` for any exit code but 0 (and 0 is not evidence: the
        caller verifies), and when it tells of an error all the same: rebase exits 0
        although flushing its tables failed (measured with 7.2). On KeyboardInterrupt,
        or any other exception, the child is ended and waited for before it propagates;
        so it is on SIGTERM, where nobody else handles that signal.
        """
        status, _, errors = self._execute(argv, progress, cwd, pass_fds, watch)
        complaints = errors if status != 0 else list(filter(_is_complaint, errors))
        if status != 0 or complaints:
            # Of a file given as /proc/self/fd/N it cannot delete the name: that is not the reason.
            reasons = [line for line in complaints if "when deleting file" not in line]
            raise QemuImgError(argv[0], status, _first(reasons or complaints))

    def _execute(
        self,
        argv: Sequence[str],
        progress: Callable[[float], None] | None,
        cwd: str | Path | None,
        pass_fds: Sequence[int] = (),
        watch: Callable[[], None] | None = None,
    ) -> tuple[int, bytes, list[str]]:
        with _interrupt_on_sigterm():
            child = self._start(argv, cwd, pass_fds)
            try:
                if argv[0] in _INFO_VERBS:
                    _limit(child.pid, resource.RLIMIT_AS, _INFO_ADDRESS_SPACE)
                assert child.stdout is not None and child.stderr is not None
                errors: list[bytes] = []
                listener = threading.Thread(
                    target=_drain, args=(child.stderr, errors), daemon=True, name="qemu-img-stderr"
                )
                listener.start()
                output = _listen(child.stdout, progress, watch)
                status = child.wait()
                listener.join()
            except BaseException:
                _end(child)
                raise
            finally:
                for pipe in (child.stdout, child.stderr):
                    if pipe is not None:
                        pipe.close()
        lines = b"".join(errors).decode("utf-8", "replace").strip().splitlines()
        return status, output, lines

    def _start(
        self, argv: Sequence[str], cwd: str | Path | None, pass_fds: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        try:
            with _inherited_limits():
                return subprocess.Popen(
                    [self.program, *argv],
                    bufsize=0,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=cwd,
                    pass_fds=pass_fds,
                    env={**os.environ, "LC_ALL": "C"},
                    # A terminal's ^C reaches us, and we decide what becomes of the child.
                    process_group=0,
                )
        except (OSError, ValueError) as error:
            raise ImageError(
                self.program, f"cannot be run: {error}", "set QCHAIN_QEMU_IMG"
            ) from None


def _first(lines: Sequence[str]) -> str:
    return lines[0].removeprefix("qemu-img: ") if lines else ""


def _is_complaint(line: str) -> bool:
    return "warning:" not in line and _COMPLAINT.search(line) is not None


def _listen(
    pipe: IO[bytes], progress: Callable[[float], None] | None, watch: Callable[[], None] | None
) -> bytes:
    """All output, as far as it is not progress; each progress mark is reported once."""
    kept = bytearray()
    while True:
        if watch is not None:
            while not select.select([pipe], [], [], _WATCH_EVERY)[0]:
                watch()
        chunk = pipe.read(65536)
        if not chunk:
            break
        kept += chunk
        if progress is not None and (marks := list(_PROGRESS.finditer(kept))):
            progress(min(float(marks[-1][1]) / 100, 1.0))
            # A mark may be cut by the end of the chunk: keep what follows the last.
            del kept[: marks[-1].end()]
        if len(kept) > _STDOUT_LIMIT:
            raise ImageError("qemu-img", "prints without end", "inspect the image by hand")
    return bytes(kept)


def _drain(pipe: IO[bytes], kept: list[bytes]) -> None:
    """Keep the beginning, read the rest: a full pipe would block the child."""
    room = _STDERR_LIMIT
    while chunk := pipe.read(65536):
        kept.append(chunk[:room])
        room -= len(kept[-1])


def _end(child: subprocess.Popen[bytes]) -> None:
    """TERM, after a second KILL, and in any case wait: no writer may outlive us.

    All of its group: $QCHAIN_QEMU_IMG may be a script that waits for the real one.
    """
    try:
        _signal(child, signal.SIGTERM)
        until = time.monotonic() + _KILL_AFTER
        while not _has_ended(child) and time.monotonic() < until:
            time.sleep(0.01)
    finally:  # a second ^C included
        # It is not waited for yet, so that its number is nobody else's.
        _signal(child, signal.SIGKILL)
        child.wait()


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    if child.returncode is not None:
        return True
    found = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    return found is not None


def _limit(pid: int, kind: int, soft: int) -> None:
    """Lower a limit of a running child; one that has ended needs none."""
    try:
        hard = resource.prlimit(pid, kind)[1]
        resource.prlimit(pid, kind, (soft if hard < 0 else min(soft, hard), hard))
    except (ProcessLookupError, PermissionError):
        pass


_limits_lock = threading.Lock()


@contextmanager
def _inherited_limits() -> Iterator[None]:
    """No core dumps (they hold guests' data), as many descriptors as we may have.

    Set here for the moment of the fork and inherited: code between fork and exec
    (`preexec_fn`) may deadlock where there are threads.
    """
    with _limits_lock:
        core = resource.getrlimit(resource.RLIMIT_CORE)
        files = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, core[1]))
            resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_CORE, core)
            resource.setrlimit(resource.RLIMIT_NOFILE, files)


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """SIGTERM becomes KeyboardInterrupt, unless somebody handles it already."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    # Only the main thread may change handlers; in others the owner of main decides.
    mine = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if mine:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
