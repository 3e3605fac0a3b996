"""What the recovery tests share: a merge that is killed before a step of one's choice."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from merging import Disk

from qchain.chain.chain import Chain, open_chain
from qchain.chain.chain_tree import ChainTree
from qchain.chain.gate import Gate
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Command, Rename, Step, Unlink
from qchain.run.execute import execute
from qchain.run.recover import journals_at

__all__ = [
    "LINES",
    "commit_began",
    "deleting",
    "dies",
    "killed",
    "renaming",
    "stopped",
    "the_journal",
]

LINES = ["256k:A", "64k:- 64k:B 128k:-", "64k:C 192k:-"]
"""base, l1, l2; each shows something through."""


def dies(work: Callable[[], object]) -> bool:
    """Do `work` in a child; whether a signal ended it. That it fails instead fails the test."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "it failed"
    return False


def killed(plan: Plan, chain: Chain | ChainTree, when: Callable[[int, Step], bool]) -> bool:
    """Carry out `plan` in a child that is killed before the first step for which `when` holds.

    Returns: whether it came to that.
    """
    seen = 0

    def look(step: Step) -> None:
        nonlocal seen
        if when(seen, step):
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    return dies(lambda: execute(plan, chain, before_step=look))


def stopped(
    disk: Disk,
    drop: Iterable[str],
    options: MergeOptions,
    when: Callable[[int, Step], bool],
    gate: Gate | None = None,
) -> Plan:
    """Merge in a child that is killed before the first step for which `when` holds."""
    with open_chain(disk.active, gate) as chain:
        plan = make_plan(chain, Request(drop=tuple(drop)), options)
        assert not plan.refusals, plan.refusals
        assert killed(plan, chain, when), "it came to its end"
    return plan


def renaming(_number: int, step: Step) -> bool:
    return isinstance(step, Rename)


def deleting(_number: int, step: Step) -> bool:
    """The first image that is deleted."""
    return isinstance(step, Unlink) and not step.path.name.startswith((".", "image"))


def commit_began() -> Callable[[int, Step], bool]:
    """The step after the commit: it has written, and nothing is flushed or noted yet."""
    done = False

    def when(_number: int, step: Step) -> bool:
        nonlocal done
        after, done = done, isinstance(step, Command) and step.commits
        return after

    return when


def the_journal(directory: Path) -> Path:
    (found,) = journals_at(directory)
    return found
