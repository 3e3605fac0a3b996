"""Plan the deletion of snapshots: which files merge, which go, what the records then say.

Deleting Sk drops the point state(Sk), on every disk that it holds. The image above takes the
content in and keeps its name (`--names kept`), so that no surviving state and no live image is
called otherwise than before: only overlays and parents change.

    v <- v.1 <- v.2 <- v.3*         delete the second of three, states v, v.1, v.2
    v <-------- v.2 <- v.3*         its state v.1 went into v.2: overlay of the first one
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from qchain.chain.chain_tree import ChainTree, open_tree
from qchain.chain.gate import Gate
from qchain.chain.scan import identity
from qchain.domains.apply import Records, records_of
from qchain.domains.checks import domain_refusals, record_refusals, use_refusals
from qchain.domains.connection import Host
from qchain.domains.edit import Place, moved, with_parent
from qchain.domains.files import Files, all_files
from qchain.domains.inventory import Inventory, others, pool_directories
from qchain.domains.journal import MERGED, Gone, Job
from qchain.domains.records import Snapshot, real
from qchain.domains.work import plan_merge
from qchain.errors import Refused, UsageError
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan

__all__ = ["Deletion", "Wishes", "planned_deletion"]


@dataclass(frozen=True)
class Wishes:
    """What is asked for.

    Attributes:
        names: the snapshots to delete.
        options: of the merge.
        gate: which files may be opened.
        also: overlays that no record names and whose content is to stay too.
        discard: delete the files of abandoned branches that hang from what is deleted.
    """

    names: tuple[str, ...]
    options: MergeOptions = field(default_factory=MergeOptions)
    gate: Gate = field(default_factory=Gate)
    also: tuple[Path, ...] = ()
    discard: bool = False


@dataclass(frozen=True)
class Deletion:
    """What would be done, and why it would not (`refusals`). `merge`: None without any."""

    inventory: Inventory
    job: Job
    merge: tuple[ChainTree, Plan] | None
    refusals: tuple[str, ...]


@dataclass
class _Disk:
    """One disk: files by real name, `gone` from the top down."""

    target: str
    files: Files
    live: str
    drop: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    actives: list[str] = field(default_factory=list)


@contextmanager
def planned_deletion(
    host: Host,
    inventory: Inventory,
    wishes: Wishes,
    words: str,
    progress: Callable[[int, int], None] | None = None,
    version: tuple[int, int, int] | None = None,
) -> Iterator[Deletion]:
    """Plan to delete snapshots; the chains stay open until it is left.

    Raises: `UsageError` for a snapshot that is none, or a request without one.
    """
    chosen = _chosen(inventory, wishes.names)
    refusals = domain_refusals(inventory, _live_command(inventory, chosen))
    refusals += [
        f"{each.name}: is an internal snapshot, which lies within the image; "
        f"'virsh snapshot-delete {inventory.name} {each.name}'"
        for each in chosen
        if each.internal
    ]
    if wishes.options.names != "kept":
        refusals.append("--names: the live image of a domain keeps its name; leave it out")
    if wishes.options.keep_files:
        refusals.append("--keep-files: records and files change together; leave it out")
    token = secrets.token_hex(3)
    empty = Job(token, host.uri, inventory.name, inventory.uuid, words, records_of(inventory),
                records_of(inventory))  # fmt: skip
    if refusals:
        yield Deletion(inventory, empty, None, tuple(refusals))
        return
    more = [str(path.absolute()) for path in wishes.also]
    files = all_files(inventory, wishes.gate, more)
    refusals = record_refusals(inventory, files) + _also_refusals(more, files)
    if refusals:
        yield Deletion(inventory, empty, None, tuple(refusals))
        return
    names = frozenset(each.name for each in chosen)
    disks = [_disk(inventory, target, names, files[target], wishes) for target in files]
    disks = [disk for disk in disks if disk.drop or disk.gone]
    scan = [*wishes.options.scan, *pool_directories(host), *_directories(host, inventory)]
    options = replace(wishes.options, scan=tuple(dict.fromkeys(scan)))
    home = Path(disks[0].live if disks else next(iter(files.values())).tops()[0]).parent
    job = replace(
        empty,
        after=_after(inventory, names, disks),
        actives=tuple(Path(name) for disk in disks if disk.drop for name in disk.actives),
        drop=tuple(_path(disk, name) for disk in disks for name in disk.drop),
        gone=tuple(_gone(disk, name) for disk in disks for name in disk.gone),
        options=options,
        allow=tuple(sorted({place for disk in disks for place in disk.files.places()})),
        home=home,
    )
    changed = {real(str(path)) for path in (*job.drop, *(each.path for each in job.gone))}
    refusals = use_refusals(host, inventory, changed)
    memory = [each.memory for each in chosen if each.memory]
    if memory:
        refusals.append(
            f"{inventory.name}: the snapshot's RAM is in {memory[0]}; deleting such a snapshot "
            "comes with a later version"
        )
    if not job.drop or refusals:
        yield Deletion(inventory, job, None, tuple(refusals))
        return
    with open_tree(job.actives, wishes.gate) as tree:
        plan = plan_merge(tree, job.drop, options, progress, version)
        job = replace(job, token=plan.token)
        yield Deletion(inventory, job, (tree, plan), tuple(map(_in_our_words, plan.refusals)))


def _chosen(inventory: Inventory, names: Sequence[str]) -> list[Snapshot]:
    if not names:
        raise UsageError(inventory.name, "no snapshot is named", "name at least one")
    known = ", ".join(list(inventory.snapshots)[:8]) or "none"
    for name in names:
        if name not in inventory.snapshots:
            raise UsageError(
                name, f"is no snapshot of {inventory.name}", f"its snapshots are: {known}"
            )
    return [inventory.snapshots[name] for name in dict.fromkeys(names)]


def _in_our_words(refusal: str) -> str:
    """A merge knows no --also."""
    path = refusal.partition(": ")[0]
    theirs = (
        "merge that overlay too (name its active image as well), or rebase it onto another image"
    )
    return refusal.replace(theirs, f"keep what it shows too with '--also {path}', or remove it")


def _also_refusals(more: Sequence[str], files: Mapping[str, Files]) -> list[str]:
    return [
        f"{name}: backs on no image of the domain, or cannot be opened; leave --also out"
        for name in more
        if not any(real(name) in each.images for each in files.values())
    ]


def _live_command(inventory: Inventory, chosen: Sequence[Snapshot]) -> str:
    """What to type while the guest runs: libvirt's own commit, then the record."""
    snapshot = chosen[0]
    for target, overlay in snapshot.overlays.items():
        state = snapshot.keeps(target)
        if state is not None and overlay.source is not None:
            top = overlay.source.path
            live = inventory.disks[target].source.path if target in inventory.disks else None
            end = "--active --pivot" if top == live else "--wait"
            return f"virsh blockcommit {inventory.name} {target} --base {state} --top {top} {end}"
    return f"virsh snapshot-delete {inventory.name} {snapshot.name}"


def _directories(host: Host, inventory: Inventory) -> list[Path]:
    """Where the images of other domains lie: one of them may back on ours."""
    places = {Path(use.path).parent for use in others(host, inventory.uuid)}
    return sorted(place for place in places if place.is_dir() and str(place) not in ("/dev", "/"))


# --- files -------------------------------------------------------------------------


def _disk(
    inventory: Inventory, target: str, names: frozenset[str], files: Files, wishes: Wishes
) -> _Disk:
    """What becomes of one disk's files."""
    source = inventory.disks[target].source.path
    assert source is not None
    out = _Disk(target, files, real(source))
    kept = {out.live} | {real(str(path)) for path in wishes.also}
    wanted: set[str] = set()
    for snapshot in inventory.snapshots.values():
        state = snapshot.keeps(target)
        if state is not None:
            (wanted if snapshot.name in names else kept).add(real(state))
    drop = wanted - kept
    # A file without anything above is not merged but deleted, and what then has nothing above.
    while True:
        used = {files.images[name].below for name in files.images if name not in out.gone}
        bare = [
            name
            for name in files.images
            if name not in used
            and name not in out.gone
            and name not in kept
            and (name in drop or (wishes.discard and _hangs(files, name, wanted)))
        ]
        if not bare:
            break
        out.gone += bare
    out.drop = [name for name in files.images if name in drop and name not in out.gone]
    # What goes and backs on what is dropped is merged like all others first: until then, and if
    # the merge fails, nothing of it may be missing.
    below = {image.below for image in files.images.values()}
    out.actives = [out.live]
    for name in files.images:
        if name in below or name == out.live:
            continue
        if name not in out.gone or not set(files.line(name)).isdisjoint(out.drop):
            out.actives.append(name)
    return out


def _hangs(files: Files, name: str, wanted: set[str]) -> bool:
    """Whether an image is of a branch that is abandoned: right above a state that goes."""
    below = files.images[name].below
    return below is not None and below in wanted


def _path(disk: _Disk, name: str) -> Path:
    return Path(disk.files.images[name].path)


def _gone(disk: _Disk, name: str) -> Gone:
    path = _path(disk, name)
    if not set(disk.files.line(name)).isdisjoint(disk.drop):
        return Gone(path, MERGED)
    known = identity(path)
    if known is None or path.is_symlink():
        raise Refused(path, "is a symbolic link or gone", "name the file itself in the records")
    return Gone(path, known)


# --- records -----------------------------------------------------------------------


def _after(inventory: Inventory, names: frozenset[str], disks: Sequence[_Disk]) -> Records:
    """What the records say when the snapshots `names` are gone."""

    def survivor(name: str | None) -> str | None:
        line = inventory.line(name)
        return next((each.name for each in line if each.name not in names), None)

    snapshots = {}
    for snapshot in inventory.snapshots.values():
        if snapshot.name in names:
            continue
        xml = snapshot.xml
        parent = survivor(snapshot.parent)
        if parent != snapshot.parent:
            xml = with_parent(xml, parent)
        moves: dict[str, Place] = {}
        for disk in disks:
            moves |= _moves(inventory, snapshot, disk)
        snapshots[snapshot.name] = moved(xml, moves)
    moves = {}
    for disk in disks:
        moves |= _moves(inventory, None, disk)
    return Records(moved(inventory.xml, moves), snapshots, survivor(inventory.current))


def _moves(inventory: Inventory, snapshot: Snapshot | None, disk: _Disk) -> dict[str, Place]:
    """For each file that goes, by real name, the one that has its content then.

    Of several (branches) the live one, else the one of this snapshot's descendants.
    """
    files = disk.files
    preferred = [disk.live]
    if snapshot is not None:
        preferred += [
            real(state)
            for each in inventory.snapshots.values()
            if snapshot in inventory.line(each.name)
            and (state := each.keeps(disk.target)) is not None
        ]
    preferred += disk.actives
    lines = [files.line(name) for name in dict.fromkeys(preferred)]
    out = {}
    for name in disk.drop:
        for line in lines:
            if name in line:
                above = [each for each in line[: line.index(name)] if each not in disk.drop]
                if above and above[-1] not in disk.gone:
                    image = files.images[above[-1]]
                    out[name] = Place(image.path, image.format)
                    break
    return out
