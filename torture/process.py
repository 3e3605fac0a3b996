"""The command line in a child process that can be killed at a spot of one's choice.

The child is a fork: what takes a third of a second to import is there already. It leads a session
of its own, so that whatever it started is found and killed with it.
"""

from __future__ import annotations

import mmap
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from qchain_cli import merge, planning  # noqa: F401
from qchain_cli import recover as _recover  # noqa: F401
from qchain_cli.main import main

import qchain.run.execute
import qchain.run.recover  # noqa: F401  (imported once, before the forks)
from qchain.run.journal import Journal

__all__ = ["OURS", "THEIRS", "Child", "Counts", "Ended", "Spot", "count", "run"]

OURS = (
    "write,pwrite64,fsync,fdatasync,ftruncate,rename,renameat,renameat2,unlink,unlinkat,link,"
    "linkat,symlink,symlinkat,mkdir,mkdirat,rmdir,chmod,fchmod,fchmodat,chown,fchown,lchown,"
    "fchownat,setxattr,lsetxattr,fsetxattr,copy_file_range,sendfile"
)
"""The system calls by which qchain itself changes anything."""

THEIRS = "pwrite64,pwritev,pwritev2,fdatasync,fsync,fallocate,ftruncate,io_uring_enter,io_submit"
"""Those of qemu-img; it starts a ring, and writes through threads all the same."""

# Every call of qemu-img is numbered. `count`: note its system calls. Else the one with the number
# AT is killed at its NTH call of CALL ("both": qchain dies with it), or qchain alone is (orphan).
WRAPPER = f"""#!/bin/sh
number=0
[ ! -e "$TORTURE/number" ] || read -r number <"$TORTURE/number"
number=$((number + 1))
echo $number >"$TORTURE/number"
if [ "$AT" = count ]; then
    exec strace -f -o "$TORTURE/calls.$number" -e trace={THEIRS} -e signal=none qemu-img "$@"
fi
[ "$AT" = $number ] || exec qemu-img "$@"
if [ "$HOW" = orphan ]; then
    : >"$TORTURE/hit"
    kill -9 $PPID
    sleep 0.05
    exec qemu-img "$@"
fi
strace -f -o /dev/null -e trace=$CALL -e inject=$CALL:signal=KILL:when=$NTH qemu-img "$@"
code=$?
if [ $code = 137 ]; then
    : >"$TORTURE/hit"
    [ "$HOW" != both ] || kill -9 $PPID
fi
exit $code
"""


@dataclass(frozen=True)
class Spot:
    """Where to kill. `kind`:

    "step": before (nth even) or after (odd) the journal names a step, number `at`;
    "own": qchain at its `nth` system call `call`;
    "both", "qemu", "orphan": qemu-img number `at` at its `nth` `call`, with qchain, alone; or
    qchain alone, while that one goes on;
    "time": all of them after `seconds`. "none": not at all.
    """

    kind: str = "none"
    at: int = 0
    call: str = ""
    nth: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        match self.kind:
            case "step":
                return f"{('before', 'after')[self.nth % 2]} the journal names step {self.at}"
            case "own":
                return f"qchain at {self.call} {self.nth}"
            case "both" | "qemu":
                alone = "" if self.kind == "both" else " alone"
                return f"qemu-img{alone}, run {self.at}, at {self.call} {self.nth}"
            case "orphan":
                return f"qchain alone in qemu-img's run {self.at}"
            case "time":
                return f"after {self.seconds:.3f} s"
        return "not at all"


@dataclass
class Counts:
    """What a whole run does: steps in the journal, system calls, how long it takes."""

    steps: int = 0
    seconds: float = 0.0
    own: Counter[str] = field(default_factory=Counter)
    theirs: dict[int, Counter[str]] = field(default_factory=dict)

    def spot(self, dice: Random) -> Spot:
        """One of all the spots, each kind about as often as the others."""
        kind = dice.choice(
            ("step", "step", "own", "both", "both", "both", "qemu", "time", "orphan")
        )
        writing = [at for at, calls in self.theirs.items() if calls]
        if (kind == "own" and not self.own) or (kind in ("both", "qemu", "orphan") and not writing):
            kind = "step"
        if kind == "step":
            return Spot("step", dice.randrange(self.steps), nth=dice.randrange(2))
        if kind == "own":
            call = dice.choice(sorted(self.own))
            return Spot("own", call=call, nth=dice.randint(1, self.own[call]))
        if kind == "time":
            return Spot("time", seconds=dice.uniform(0, 1.1) * self.seconds)
        # Those that write most, or late, are rebase, commit and convert: half of all.
        large = [at for at in writing if sum(self.theirs[at].values()) > 4]
        at = dice.choice(large if large and dice.random() < 0.7 else writing)
        call = dice.choice(sorted(self.theirs[at]))
        return Spot(kind, at, call, dice.randint(1, self.theirs[at][call]))


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (negative: the signal), what it said, whether it was hit."""

    code: int
    out: str
    err: str
    hit: bool
    seconds: float


class Child:
    """The command line `argv` in a process of its own, to be killed at `spot`."""

    def __init__(
        self,
        argv: list[str],
        work: Path,
        spot: Spot | None = None,
        *,
        counting: bool = False,
        program: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`work`: where output and counters go. `program`: another qemu-img than the usual."""
        self.spot, self.work = spot or Spot(), work
        self.shared = mmap.mmap(-1, 16)
        work.mkdir(exist_ok=True)
        for name in ("number", "hit"):
            (work / name).unlink(missing_ok=True)
        if program is None and (counting or self.spot.kind in ("both", "qemu", "orphan")):
            program = work / "qemu-img"
            program.write_text(WRAPPER)
            program.chmod(0o755)
        self.environment = {
            **(environment or {}),
            "TORTURE": str(work),
            "AT": "count" if counting else str(self.spot.at),
            "HOW": self.spot.kind,
            "CALL": self.spot.call,
            "NTH": str(self.spot.nth),
        }
        if program is not None:
            self.environment["QCHAIN_QEMU_IMG"] = str(program)
        self.begun = time.monotonic()
        here, there = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._be_qchain(argv, here)
        os.close(here)
        self.tracer = self._trace(counting)
        os.write(there, b"x")
        os.close(there)

    def _be_qchain(self, argv: list[str], start: int) -> None:
        code = 70
        try:
            os.setsid()
            for number, name in ((0, None), (1, "out"), (2, "err")):
                flags = os.O_RDONLY if name is None else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                fd = os.open(os.devnull if name is None else self.work / name, flags)
                os.dup2(fd, number)
                os.close(fd)
            sys.stdin, sys.stdout, sys.stderr = (
                open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
                for number in (0, 1, 2)
            )
            os.environ.update(self.environment)
            self._watch_journal()
            os.read(start, 1)
            code = int(main(argv))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _watch_journal(self) -> None:
        """Count the steps that the journal names, and die at one of them."""
        original, spot, shared = Journal.write, self.spot, self.shared

        def write(journal: Journal, *arguments: object) -> None:
            seen = int.from_bytes(shared[:8], "little")
            shared[:8] = (seen + 1).to_bytes(8, "little")
            if spot.kind == "step" and spot.at == seen and not spot.nth % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            original(journal, *arguments)  # type: ignore[arg-type]
            if spot.kind == "step" and spot.at == seen:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.write = write  # type: ignore[method-assign,assignment]

    def _trace(self, counting: bool) -> subprocess.Popen[bytes] | None:
        """Let strace at it, if it is to count the child's own calls or to kill it at one."""
        if counting:
            words = ["-o", str(self.work / "calls.own"), "-e", f"trace={OURS}", "-e", "signal=none"]
        elif self.spot.kind == "own":
            when = f"inject={self.spot.call}:signal=KILL:when={self.spot.nth}"
            words = ["-o", os.devnull, "-e", f"trace={self.spot.call}", "-e", when]
        else:
            return None
        tracer = subprocess.Popen(
            ["strace", "-p", str(self.pid), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        status = Path(f"/proc/{self.pid}/status")
        while tracer.poll() is None and "TracerPid:\t0\n" in status.read_text():
            time.sleep(0.002)
        return tracer

    def alive(self) -> bool:
        """Whether qchain itself still runs (it is not waited for)."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self, limit: float = 120.0, before_kill: Callable[[], None] | None = None) -> Ended:
        """Wait for its end, or bring it about; afterwards nothing of it runs any more.

        But for an orphan: that one may. `before_kill` is done when its time has come ("time").
        """
        try:
            return self._ended(limit, before_kill)
        except BaseException:
            kill_session(self.pid)
            raise

    def _ended(self, limit: float, before_kill: Callable[[], None] | None) -> Ended:
        killed = False
        until = self.begun + (self.spot.seconds if self.spot.kind == "time" else limit)
        while self.alive():
            if time.monotonic() > until:
                if before_kill is not None:
                    before_kill()
                kill_session(self.pid)
                killed = True
                break
            time.sleep(0.002)
        seconds = time.monotonic() - self.begun
        status = os.waitpid(self.pid, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        if self.spot.kind != "orphan":
            kill_session(self.pid)
        if self.tracer is not None:
            self.tracer.wait()
        if killed and self.spot.kind != "time":
            raise TimeoutError(f"still at work after {limit:g} s")
        hit = (self.work / "hit").exists() or code == -signal.SIGKILL
        out, err = (self._said(name) for name in ("out", "err"))
        return Ended(code, out, err, hit, seconds)

    def _said(self, name: str) -> str:
        path = self.work / name
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def steps(self) -> int:
        return int.from_bytes(self.shared[:8], "little")


def kill_session(leader: int) -> None:
    """Kill what `leader` started, process groups of their own included, until nothing is left."""
    while members := list(_session(leader)):
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.002)


def _session(leader: int) -> Iterator[int]:
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # state, parent, group, session
        if int(fields[3]) == leader and fields[0] not in "ZX":
            yield int(process.name)


def run(argv: list[str], work: Path, spot: Spot | None = None, **more: object) -> Ended:
    """The command line to its end, or to the spot where it is killed."""
    return Child(argv, work, spot, **more).end()  # type: ignore[arg-type]


def count(argv: list[str], work: Path) -> tuple[Ended, Counts]:
    """The command line to its end, and what it does on its way."""
    for path in work.glob("calls.*"):
        path.unlink()
    child = Child(argv, work, counting=True)
    ended = child.end()
    counts = Counts(child.steps, ended.seconds)
    counts.own = calls_in(work / "calls.own")
    for path in work.glob("calls.[0-9]*"):
        counts.theirs[int(path.suffix[1:])] = calls_in(path)
    return ended, counts


def calls_in(log: Path) -> Counter[str]:
    """How often each system call is in a log of strace, in the thread that has most of it.

    strace counts for every thread by itself: what the busiest does can be hit.
    """
    threads: dict[str, Counter[str]] = {}
    for line in log.read_text().splitlines():
        if found := re.match(r"(?:(\d+) +)?(\w+)\(", line):
            threads.setdefault(found[2], Counter())[found[1] or ""] += 1
    return Counter({call: max(each.values()) for call, each in threads.items()})
