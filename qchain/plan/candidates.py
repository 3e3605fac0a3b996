"""The ways of merging one group: each with its figures, or the reason why it is not possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from qchain.chain.chain_tree import ChainTree
from qchain.chain.layer import Layer, Qcow2Layer
from qchain.hostfile import mount_id
from qchain.plan.bitmaproom import BitmapCount
from qchain.plan.bitmaps import bitmap_obstacle
from qchain.plan.clusters import ClusterCount
from qchain.plan.copying import new_file_bytes
from qchain.plan.growth import Growth, growth_of
from qchain.plan.model import DEFAULT, TimeModel
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Group
from qchain.plan.space import device_shortage, freed_by, highest, taken_by
from qchain.plan.traffic import Traffic, count_traffic
from qchain.plan.versions import DEFAULT as DEFAULT_BEHAVIOUR
from qchain.plan.versions import Behaviour
from qchain.qcow2.header_limits import MAX_L1_BYTES

__all__ = ["Candidate", "candidates_of", "choose", "figures_of", "rank"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way of merging a group. All sizes in bytes.

    `exact`: whether `read_bytes` and `write_bytes` are what qemu-img will request; if not they
    are that where contents do not repeat, and otherwise an upper bound.
    `target`: layer index, None for a copy. `net` traffic: what the reason quotes.
    `target_growth_bytes`: by how much the target's file becomes longer (raw: takes more
    space), `growth` tells it in detail. `peak_extra_bytes`: of the filesystem that needs most.
    """

    strategy: str
    engine: str
    target: int | None
    reason: str | None = None
    read_bytes: int = 0
    write_bytes: int = 0
    extents: int = 0
    target_growth_bytes: int = 0
    peak_extra_bytes: int = 0
    freed_bytes: int = 0
    seconds: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)
    growth: Growth | None = None
    exact: bool = False

    @property
    def feasible(self) -> bool:
        return self.reason is None

    @property
    def risk(self) -> str:
        """What no longer reads as before if the merge is stopped midway and given up: "none" of
        the points, or "dropped" ones, which a commit writes over. Kept ones always do."""
        return "none" if self.strategy in ("pull", "copy") else "dropped"


def strategy_of(position: int, count: int) -> str:
    """The word for the target at `position` of a group of `count` (0 = the kept image)."""
    if position == 0:
        return "pull"
    return "commit" if position == count - 1 else "both"


def _apart(a: Layer, b: Layer) -> bool:
    """Whether no rename leads from the directory of one to that of the other."""
    if a.file.id.device != b.file.id.device:
        return True
    return mount_id(a.path.parent) != mount_id(b.path.parent)


def obstacle(tree: ChainTree, group: Group, target: int, options: MergeOptions) -> str | None:
    """Why `target` (a layer index) cannot receive the data; None if it can."""
    layers = tree.layers
    kept, layer = layers[group.kept], layers[target]
    lowest = layers[group.owned[-1]]
    if target in group.shared:
        return f"{layer.path.name} goes with another group: other images still back on it"
    strategy = strategy_of(group.members.index(target), len(group.members))
    if options.strategy not in ("auto", strategy):
        return f"--strategy {options.strategy} was asked for"
    if options.names == "lowest" and layer is not lowest:
        for each in (layer, lowest):
            if each.file.is_block_device:
                return f"{each.path.name} is a block device and cannot be renamed"
    if options.names == "lowest" and _apart(lowest, layer):
        return f"it lies on another filesystem than {lowest.path.name}, whose name is to stay"
    if target == group.kept:
        return None
    if layer.header is not None and layer.header.lazy_refcounts:
        # Stopped within, its refcounts are wrong and only its dirty bit says so; `commit`,
        # repeated, clears that without mending them (measured with 7.2).
        return (
            f"{layer.path.name} has lazy refcounts, which a commit that is stopped leaves wrong; "
            "'qemu-img amend -o lazy_refcounts=off' first"
        )
    bitmaps = bitmap_obstacle(layers, group, target, options)
    if bitmaps is not None:
        return bitmaps
    if layer.format != kept.format and options.names == "kept":
        trap = (
            f"{layer.path.name} is {layer.format}: under the name {kept.path.name} it would be "
            f"taken for {kept.format}"
        )
        overlays = tree.overlays[group.kept]
        if overlays:
            # No order of a rename and a header write keeps the overlay readable throughout.
            return f"{trap} by {layers[overlays[0]].path.name}; use --names lowest"
        if not options.allow_format_change:
            return f"{trap}; allow it with --allow-format-change, or use --names lowest"
    if layer.format == "raw" and kept.size != layer.size and layer.file.is_block_device:
        return f"{layer.path.name} is a block device and cannot change its size"
    if options.names == "kept":
        for each in (kept, layer):
            if each.file.is_block_device:
                return f"{each.path.name} is a block device and cannot be renamed"
    if options.names == "kept" and _apart(kept, layer):
        return "it lies on another filesystem, from where no rename leads to the kept name"
    if isinstance(layer, Qcow2Layer) and kept.size > layer.size:
        tables = -(-kept.size // (layer.cluster_size * layer.tables.per_table))
        if tables * 8 > MAX_L1_BYTES:
            return (
                f"{layer.path.name} cannot grow to {kept.size} bytes: its L1 table would be larger "
                f"than {MAX_L1_BYTES} bytes"
            )
    backing = tree.below[target]
    below = 0 if backing is None else layers[backing].size
    if (
        isinstance(layer, Qcow2Layer)
        and layer.version < 3
        and kept.size > layer.size
        and below > layer.size
    ):
        return (
            f"{layer.path.name} has compat 0.10 and cannot grow over a longer backing file; "
            "'qemu-img amend -o compat=1.1' first"
        )
    return None


def _figures(
    layers: Sequence[Layer],
    group: Group,
    position: int,
    traffic: Traffic,
    grown: Growth,
    model: TimeModel,
    exact: bool,
) -> Candidate:
    target = group.members[position]
    reads = traffic.commit_bytes + traffic.pull_read_bytes
    written = traffic.commit_bytes + traffic.pull_bytes
    pulls = position < group.count - 1
    # Where no hard link is possible each request waits for the device (`sequence.pull`).
    slower = layers[target].file.is_block_device
    requests = -(-traffic.commit_bytes // (1 << 20)) + traffic.extents
    seconds = model.seconds(
        read=reads,
        written=written,
        requests=requests if position else 0,
        serial_requests=traffic.extents * (4 if slower else 1) if pulls else 0,
        files=len(group.line),
        commands=(1 if position else 0) + (3 if pulls else 0),
    )
    return Candidate(
        strategy_of(position, group.count),
        "qemu-img",
        target,
        None,
        reads,
        written,
        traffic.extents,
        grown.file,
        highest(taken_by(layers, group, target, grown)),
        0,
        round(seconds, 3),
        traffic,
        grown,
        # Only a pull compares.
        exact or not (traffic.pull_bytes or traffic.unsure_bytes),
    )


def figures_of(
    layers: Sequence[Layer],
    group: Group,
    model: TimeModel = DEFAULT,
    progress: Callable[[int, int], None] | None = None,
    *,
    options: MergeOptions | None = None,
    behaviour: Behaviour = DEFAULT_BEHAVIOUR,
) -> list[Candidate]:
    """What every target of the group would cost, the kept image first, possible or not.

    First by qemu-img; then by the native engine, if it is among the engines, the new file last.

    Raises: `ImageError` when the contents cannot be read (`options.exact`).
    """
    options = options or MergeOptions()
    exact = options.exact
    members = [layers[index] for index in group.members]
    under = [layers[index] for index in group.under]
    below = [*(layers[index].size for index in group.line[1:]), 0]
    clusters = [
        ClusterCount(layer, members[0].size, size)
        for layer, size in zip(members, below, strict=False)
    ]
    counted = count_traffic(
        members,
        range(len(members)),
        under,
        progress,
        clusters,
        exact=exact,
        behaviour=behaviour,
    )
    bitmaps = BitmapCount(layers, group, options)
    out = []
    for position, (traffic, count) in enumerate(zip(counted, clusters, strict=True)):
        grown = growth_of(members[position], count, bitmaps.room(group.members[position]))
        out.append(_figures(layers, group, position, traffic, grown, model, exact))
    if "native" in options.engines:
        out += _native_figures(layers, group, out, model)
    return out


def _native_figures(
    layers: Sequence[Layer], group: Group, others: Sequence[Candidate], model: TimeModel
) -> list[Candidate]:
    """By the native engine, the new file last."""
    # Imported late: only where that engine is weighed.
    from qchain.plan.native import costs_of

    out = []
    for cost in costs_of(layers, group, [each.traffic for each in others]):
        position = 0 if cost.target is None else group.members.index(cost.target)
        strategy = "copy" if cost.target is None else strategy_of(position, group.count)
        growth = None
        if cost.target is not None and cost.reason is None:
            growth = cost.growth(layers[cost.target])
        out.append(
            Candidate(
                strategy,
                "native",
                cost.target,
                cost.reason,
                cost.moved.copied,
                cost.moved.copied + cost.moved.written,
                cost.moved.calls,
                cost.grows,
                cost.grows,
                0,
                cost.seconds(len(group.line), model),
                cost.traffic(others[position].traffic),
                growth,
                True,
            )
        )
    return out


def candidates_of(
    tree: ChainTree, group: Group, figures: Sequence[Candidate], options: MergeOptions
) -> list[Candidate]:
    """Every target of the group, from the kept image down, and the copy.

    Args:
        figures: what `figures_of` gave for the group.
    """
    out = []
    for found in (*figures, _copy(tree, group, figures[0], options)):
        target, growth = found.target, found.growth
        if found.engine not in options.engines:
            reason: str | None = f"--engine {options.engines[0]} was asked for"
        elif target is None:
            reason = _no_copy(tree, group, options)
        else:
            reason = obstacle(tree, group, target, options)
            if growth is not None:
                reason = reason or device_shortage(tree.layers[target], growth)
        if found.engine == "native":
            from qchain.plan.native import no_native

            reason = reason or found.reason or no_native(tree.layers, group, target, options)
        freed = 0 if options.keep_files else freed_by(tree.layers, group, target)
        out.append(replace(found, reason=reason, freed_bytes=freed))
    return out


def _copy(
    tree: ChainTree,
    group: Group,
    pull: Candidate,
    options: MergeOptions,
    model: TimeModel = DEFAULT,
) -> Candidate:
    """The copy: what the kept image holds, and on top of that what a `pull` moves."""
    kept = tree.layers[group.kept]
    alone = group.below is None
    copied, traffic = pull.traffic.copy_bytes, pull.traffic
    if alone:
        # convert alone does it all.
        traffic = Traffic(copy_bytes=copied, extents=pull.extents)
    written = copied + traffic.pull_bytes
    room = new_file_bytes(kept, written, traffic.extents)
    seconds = model.seconds(
        read=copied + traffic.pull_read_bytes,
        written=written,
        requests=-(-copied // (2 << 20)) + traffic.extents,
        serial_requests=0 if alone else traffic.extents,
        files=len(group.line),
        commands=4,
    )
    return Candidate(
        "copy",
        "qemu-img",
        None,
        None,
        copied + traffic.pull_read_bytes,
        written,
        traffic.extents,
        room,
        room,
        0,
        round(seconds, 3),
        traffic,
    )


def _no_copy(tree: ChainTree, group: Group, options: MergeOptions) -> str | None:
    """Why the group cannot be copied; None if it can."""
    kept, lowest = tree.layers[group.kept], tree.layers[group.owned[-1]]
    if options.strategy != "copy":
        # Never less work than a pull, and the kept image's own clusters are written again.
        return "--strategy copy was not asked for"
    if options.names == "target":
        return "a new file has no name of its own to keep; use --names kept or lowest"
    renamed = kept if options.names == "kept" else lowest
    if renamed.file.is_block_device:
        return f"{renamed.path.name} is a block device and cannot be renamed"
    bitmaps = bitmap_obstacle(tree.layers, group, None, options)
    if bitmaps is not None:
        return bitmaps
    if options.names == "lowest" and lowest.format != kept.format:
        # Until it is deleted it reads through that name, in the format that headers record.
        return (
            f"{kept.path.name} reads through {lowest.path.name} as {lowest.format} until the end; "
            "use --names kept"
        )
    return None


def rank(candidate: Candidate, prefer: str) -> tuple[float, float, float]:
    """What is minimised: estimated seconds, then bytes written; `prefer` "writes" or
    "space" puts bytes written, or peak space, first."""
    time, writes = candidate.seconds, float(candidate.write_bytes)
    space = float(candidate.peak_extra_bytes)
    orders = {
        "time": (time, writes, space),
        "writes": (writes, time, space),
        "space": (space, time, writes),
    }
    return orders[prefer]


def choose(candidates: Sequence[Candidate], prefer: str) -> Candidate | None:
    """The best feasible candidate by `rank`; None if there is none."""
    feasible = [candidate for candidate in candidates if candidate.feasible]
    return min(feasible, key=lambda candidate: rank(candidate, prefer), default=None)
