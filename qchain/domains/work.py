"""Carry out a change to a domain: new overlays, records, merge, deletion, under one journal.

Stopped anywhere, `finish` brings files and records to the planned end, for each part may be
repeated. The live name never changes in a merge, so that the definition is true throughout;
the snapshots' records change right before the first name goes, when everything is verified and
nothing is missing yet.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qchain.chain.chain import open_chain
from qchain.chain.chain_tree import ChainTree, open_tree
from qchain.chain.gate import Gate
from qchain.chain.scan import JOURNAL_SUFFIX, WORK_PREFIX, identity, unfinished_domains
from qchain.domains.apply import Before, bring, handle_of, require_known, require_unchanged
from qchain.domains.connection import Host
from qchain.domains.journal import MERGED, Gone, Job, read_job
from qchain.domains.records import files_in, real
from qchain.errors import FailedMidway, QchainError, Refused
from qchain.hostfile import HostFile
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.refusals import stranger_refusals
from qchain.plan.selection import Request
from qchain.plan.steps import Rename, Step, Unlink
from qchain.run.durable import unlink_durably
from qchain.run.execute import MergeResult, Observer, execute
from qchain.run.locks import probe
from qchain.run.qemu_img import QemuImg
from qchain.run.recover import recover
from qchain.run.snapshot import take_snapshot

__all__ = ["Tools", "carry_out", "finish", "plan_merge", "put_back", "recover_job"]

_WAY_ON = "every point is intact, and the guest can be started; 'qchain recover {}' continues"


@dataclass(frozen=True)
class Tools:
    """With what it is done, and who watches. `before` is told of each change beforehand."""

    qemu: QemuImg = field(default_factory=QemuImg)
    observer: Observer | None = None
    before: Before | None = None

    def say(self, what: str) -> None:
        if self.before is not None:
            self.before(what)


def carry_out(
    host: Host,
    job: Job,
    tools: Tools | None = None,
    ready: tuple[ChainTree, Plan] | None = None,
) -> MergeResult | None:
    """Do `job`, journal first. `ready`: the merge that is part of it, its chains still open.

    Raises: `Refused` with everything as it was; `FailedMidway`, and then what is left says
        the message.
    """
    tools = tools or Tools()
    handle = handle_of(host, job.uuid, job.name)
    host.require_off(handle)
    require_unchanged(host, handle, job.before)
    _require_alone(job)
    tools.say("journal")
    job.write()
    try:
        return _do(host, handle, job, tools, ready)
    except KeyboardInterrupt as error:
        left = _after(host, job, tools)
        raise KeyboardInterrupt(_spoilt(str(error)) or left) from None
    except QchainError as error:
        left = _after(host, job, tools)
        left = _spoilt(error.todo) or left
        if job.path.exists():
            raise FailedMidway(error.what, error.why, left) from None
        if isinstance(error, FailedMidway):
            raise FailedMidway(error.what, error.why, left) from None
        raise


def _require_alone(job: Job) -> None:
    """Raise `Refused` when another change has begun, or was stopped, where the images are."""
    for path in unfinished_domains({job.home, *job.allow}):
        raise Refused(
            job.name,
            f"another change is not finished ({path})",
            f"wait until it has ended, or 'qchain recover {path.parent}'",
        )


def _after(host: Host, job: Job, tools: Tools) -> str:
    """Something failed: put all back if nothing is switched; returns what is left, in words."""
    quiet = Tools(tools.qemu)
    try:
        put_back(host, job, quiet)
    except (KeyboardInterrupt, QchainError):
        return _WAY_ON.format(job.home)
    return "files and records are as before; mend this and try again"


def _spoilt(words: str) -> str:
    """What a merge says that has put itself back, where a dropped point has suffered."""
    return words if "no longer read as before" in words else ""


def _do(
    host: Host,
    handle: Any,
    job: Job,
    tools: Tools,
    ready: tuple[ChainTree, Plan] | None,
) -> MergeResult | None:
    for make in job.make:
        tools.say(f"make {make.path}")
        host.require_off(handle)
        _make(make.path, make.below, make.keep, job, tools)
    result = None
    if job.drop:
        result = _merge(host, handle, job, tools, ready)
    bring(host, handle, job.before, job.after, tools.before)
    _delete(host, handle, job, tools)
    tools.say("refresh")
    _refresh(host, job)
    tools.say("remove the journal")
    job.remove()
    return result


# --- new overlays ------------------------------------------------------------------


def _make(path: Path, below: Path, keep: bool, job: Job, tools: Tools) -> None:
    """A new overlay, unless it is there already, whole: it gets its name when it is."""
    if keep:
        if below.exists() and path.exists() and not path.samefile(below):
            return
        with open_chain(path, _gate(job)) as chain:
            take_snapshot(chain, below, keep_active_name=True, qemu=tools.qemu)
        return
    if path.exists():
        return
    with open_chain(below, _gate(job)) as chain:
        take_snapshot(chain, path, qemu=tools.qemu)


def _gate(job: Job) -> Gate:
    """What the job was planned with: the directories of its images."""
    return Gate(allow=(*job.allow, *sorted({path.parent for path in job.files()})))


# --- the merge ---------------------------------------------------------------------


def _merge(
    host: Host,
    handle: Any,
    job: Job,
    tools: Tools,
    ready: tuple[ChainTree, Plan] | None,
) -> MergeResult | None:
    if ready is not None:
        tree, plan = ready
        hook = _switching(host, handle, job, tools, tree)
        return execute(plan, tree, tools.qemu, tools.observer, hook)
    with open_tree(job.actives, _gate(job)) as tree:
        names = {real(str(layer.path)) for layer in tree.layers}
        left = tuple(str(path) for path in job.drop if real(str(path)) in names)
        if not left:
            return None
        options = job.options
        plan = make_plan(tree, Request(drop=left), options, token=job.token)
        if plan.refusals:
            raise Refused(job.name, plan.refusals[0], "")
        hook = _switching(host, handle, job, tools, tree)
        return execute(plan, tree, tools.qemu, tools.observer, hook)


def _switching(
    host: Host, handle: Any, job: Job, tools: Tools, tree: ChainTree
) -> Callable[[Step], None]:
    """Before the first name changes the records do: everything that they name is there."""
    names = {layer.path.absolute() for layer in tree.layers}
    done = False

    def look(step: Step) -> None:
        nonlocal done
        tools.say(type(step).__name__)
        host.require_off(handle)
        if not done and (isinstance(step, Rename) or _deletes(step, names)):
            bring(host, handle, job.before, job.after, tools.before)
            done = True

    return look


def _deletes(step: Step, names: set[Path]) -> bool:
    return isinstance(step, Unlink) and step.path in names


# --- files that nobody needs -------------------------------------------------------


def _delete(host: Host, handle: Any, job: Job, tools: Tools) -> None:
    own = {identity(each.path) for each in job.gone}
    for each in job.gone:
        if not os.path.lexists(each.path):
            continue
        _require_unneeded(each, own, job)
        tools.say(f"delete file {each.path}")
        host.require_off(handle)
        unlink_durably(each.path)


def _require_unneeded(gone: Gone, own: set[Any], job: Job) -> None:
    """Raise `Refused` unless the name is still that of the file, and nobody needs it."""
    known = identity(gone.path)
    if gone.path.is_symlink() or known is None or gone.id not in (known, MERGED):
        raise Refused(gone.path, "is another file than the one that was to go", "look at it")
    places = {path.parent for path in job.files()}
    strangers = stranger_refusals({known: gone.path}, own, [*sorted(places), *job.options.scan])
    if strangers:
        raise Refused(job.name, strangers[0], "")
    with HostFile(gone.path) as file:
        if probe(file.fd).in_use:
            raise Refused(gone.path, "is in use", "wait until the other program has ended")


def _refresh(host: Host, job: Job) -> None:
    """Pools list their volumes anew; that one cannot does not matter to the change."""
    places = {real(str(path.parent)) for path in job.files()}
    for pool in host.pools():
        with contextlib.suppress(host.libvirt.libvirtError):
            text = str(pool.XMLDesc(0))
            if any(f"<path>{place}</path>" in text for place in places):
                pool.refresh(0)


# --- going on, going back ----------------------------------------------------------


def recover_job(
    path: Path, tools: Tools | None = None, *, back: bool = False, uri: str | None = None
) -> Job:
    """Finish the change whose journal lies at `path`, or put it back. Returns what it was.

    Raises: what `finish` and `put_back` raise.
    """
    job = read_job(path)
    with Host(uri or job.uri) as host:
        (put_back if back else finish)(host, job, tools or Tools())
    return job


def finish(host: Host, job: Job, tools: Tools) -> None:
    """Bring files and records to the planned end.

    Raises: `Refused` while the guest runs, or where a file is not what it was; `FailedMidway`.
    """
    handle = handle_of(host, job.uuid, job.name)
    host.require_off(handle)
    require_known(host, handle, job.before, job.after)
    merge = _merge_journal(job)
    if merge:
        # Whatever the merge has deleted by now, the records may not name.
        bring(host, handle, job.before, job.after, tools.before)
        recover(merge, qemu=tools.qemu, observer=tools.observer)
    _do(host, handle, job, tools, None)


def _merge_journal(job: Job) -> list[Path]:
    path = job.home / f"{WORK_PREFIX}{job.token}{JOURNAL_SUFFIX}"
    found = [path, path.with_name(f"{path.name}.new")]
    return [each for each in found if each.exists()][:1]


def put_back(host: Host, job: Job, tools: Tools) -> None:
    """Undo a change of which nothing is switched yet.

    Raises: `Refused` where it can only go forward.
    """
    handle = handle_of(host, job.uuid, job.name)
    host.require_off(handle)
    require_known(host, handle, job.before, job.after)
    _require_unused(host, handle, job)
    merge = _merge_journal(job)
    if merge:
        recover(merge, back=True, qemu=tools.qemu, observer=tools.observer)
    _require_whole(job)
    bring(host, handle, job.after, job.before, tools.before)
    for make in job.make:
        if not make.keep:
            unlink_durably(make.path)
    tools.say("remove the journal")
    job.remove()


def _require_unused(host: Host, handle: Any, job: Job) -> None:
    """Raise `Refused` when the guest may have written to a new overlay already."""
    used = files_in(host.domain_xml(handle), host.volume_path)
    for make in job.make:
        if not make.keep and real(str(make.path)) in used:
            raise Refused(
                make.path,
                "is live already, and the guest may have written to it; it can only go forward",
                "run 'qchain recover' without --back",
            )


def _require_whole(job: Job) -> None:
    """Raise `Refused` unless every file of the beginning is still there."""
    forward = "run 'qchain recover' without --back"
    for path in (*job.drop, *(each.path for each in job.gone)):
        if not path.exists():
            raise Refused(path, "is gone already; the change can only go forward", forward)
    for make in job.make:
        if make.keep and make.below.exists():
            raise Refused(make.below, "is there already; it can only go forward", forward)
    if not job.actives:
        return
    with open_tree(job.actives, _gate(job)) as tree:
        names = {real(str(layer.path)) for layer in tree.layers}
    for path in job.drop:
        if real(str(path)) not in names:
            raise Refused(path, "is merged already; the change can only go forward", forward)


def plan_merge(
    tree: ChainTree,
    drop: Sequence[Path],
    options: MergeOptions,
    progress: Callable[[int, int], None] | None = None,
    version: tuple[int, int, int] | None = None,
) -> Plan:
    """The merge of all disks together."""
    request = Request(drop=tuple(str(path) for path in drop))
    return make_plan(tree, request, options, progress=progress, version=version)
