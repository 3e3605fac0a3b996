"""What the native engine's tests share: a merge that is killed within its own writes.

And power losses: of what was written since the last flush any part is taken back, sector by
sector, as if it had never reached the disk.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from stopping import dies

from qchain.chain.chain import Chain
from qchain.hostfile import HostFile
from qchain.native.mover import Target
from qchain.plan.plan import Plan
from qchain.run.execute import execute

__all__ = ["Change", "killed_within", "lose"]

SECTOR = 512


@dataclass(frozen=True)
class Change:
    """What a file held at `offset` before something was written there, and its length then."""

    path: Path
    offset: int
    before: bytes
    length: int
    size: int


class _Log:
    """The changes since the last flush of each file, kept where the parent finds them."""

    def __init__(self, path: Path, at: Callable[[str, int], bool]) -> None:
        self.path, self.at = path, at
        self.changes: list[Change] = []
        self.calls = 0

    def call(self, kind: str) -> None:
        """Before a call: killed here if it is the one."""
        if self.at(kind, self.calls):
            self.path.write_bytes(pickle.dumps(self.changes))
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1

    def note(self, target: Target, offset: int, length: int) -> None:
        before = os.pread(target.fd, length, offset)
        size = os.fstat(target.fd).st_size
        self.changes.append(Change(Path(target.path), offset, before, length, size))


def killed_within(plan: Plan, chain: Chain, log: Path, at: Callable[[str, int], bool]) -> bool:
    """Carry out `plan` in a child that is killed before the call for which `at` holds.

    Args:
        at: of the kind of call ("write", "bring", "reach", "flush") and its number.
        log: where the changes since the last flush are left.

    Returns: whether it came to that.
    """

    def work() -> None:
        _watch(_Log(log, at))
        execute(plan, chain)

    return dies(work)


def _watch(log: _Log) -> None:
    write, bring, reach, flush = Target.write, Target.bring, Target.reach, Target.flush

    def watched_write(self: Target, offset: int, data: bytes) -> None:
        log.call("write")
        log.note(self, offset, len(data))
        write(self, offset, data)

    def watched_bring(self: Target, source: HostFile, start: int, offset: int, length: int) -> None:
        log.call("bring")
        log.note(self, offset, length)
        bring(self, source, start, offset, length)

    def watched_reach(self: Target, length: int) -> None:
        log.call("reach")
        log.note(self, 0, 0)
        reach(self, length)

    def watched_flush(self: Target) -> None:
        log.call("flush")
        log.changes.clear()
        flush(self)

    Target.write, Target.bring = watched_write, watched_bring  # type: ignore[method-assign]
    Target.reach, Target.flush = watched_reach, watched_flush  # type: ignore[method-assign]


def lose(log: Path, random: Random) -> None:
    """Take back a part of what was written since the last flush, newest first."""
    changes: list[Change] = pickle.loads(log.read_bytes())
    share = random.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    for change in reversed(changes):
        with change.path.open("r+b") as file:
            for at in range(0, change.length, SECTOR):
                if random.random() >= share:
                    continue
                old = change.before[at : at + SECTOR]
                file.seek(change.offset + at)
                file.write(old.ljust(min(SECTOR, change.length - at), b"\0"))
    if changes and random.random() < share:
        # The length is metadata of its own: what was written beyond it is gone too.
        os.truncate(changes[0].path, changes[0].size)
