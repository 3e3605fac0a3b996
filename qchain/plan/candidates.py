"""The ways of merging one group: each with its figures, or the reason why it is not possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qchain.chain.layer import Layer, Qcow2Layer
from qchain.hostfile import mount_id
from qchain.plan.growth import growth
from qchain.plan.model import DEFAULT, TimeModel
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Group
from qchain.plan.traffic import Traffic, count_traffic
from qchain.plan.versions import DEFAULT as DEFAULT_BEHAVIOUR
from qchain.plan.versions import Behaviour
from qchain.qcow2.header_limits import MAX_L1_BYTES

__all__ = ["Candidate", "candidates_of", "choose"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way of merging a group. All sizes in bytes.

    `exact`: whether `read_bytes` and `write_bytes` are what qemu-img will request; if not they
    are that where contents do not repeat, and otherwise an upper bound.
    `target`: layer index, None for a copy. `net` traffic: what the reason quotes.
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
    exact: bool = False

    @property
    def feasible(self) -> bool:
        return self.reason is None


def strategy_of(position: int, count: int) -> str:
    """The word for the target at `position` of a group of `count` (0 = the kept image)."""
    if position == 0:
        return "pull"
    return "commit" if position == count - 1 else "both"


def _has_valid_bitmaps(layer: Layer) -> bool:
    header = layer.header
    return header is not None and header.bitmaps_extension is not None


def _apart(a: Layer, b: Layer) -> bool:
    """Whether no rename leads from the directory of one to that of the other."""
    if a.file.id.device != b.file.id.device:
        return True
    return mount_id(a.path.parent) != mount_id(b.path.parent)


def obstacle(
    layers: Sequence[Layer], group: Group, target: int, options: MergeOptions
) -> str | None:
    """Why `target` (a layer index) cannot receive the data; None if it can."""
    kept, layer = layers[group.kept], layers[target]
    lowest = layers[group.members[-1]]
    strategy = strategy_of(group.members.index(target), len(group.members))
    if options.strategy not in ("auto", strategy):
        return f"--strategy {options.strategy} was asked for"
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
    if _has_valid_bitmaps(kept):
        return f"{kept.path.name} has bitmaps, which this way would lose"
    if layer.format != kept.format and options.names == "kept":
        trap = (
            f"{layer.path.name} is {layer.format}: under the name {kept.path.name} it would be "
            f"taken for {kept.format}"
        )
        if group.kept > 0:
            # No order of a rename and a header write keeps the overlay readable throughout.
            return f"{trap} by {layers[group.kept - 1].path.name}; use --names lowest"
        if not options.allow_format_change:
            return f"{trap}; allow it with --allow-format-change, or use --names lowest"
    if layer.format == "raw" and kept.size != layer.size and layer.file.is_block_device:
        return f"{layer.path.name} is a block device and cannot change its size"
    if options.names == "kept" and kept.file.is_block_device:
        return f"{kept.path.name} is a block device and cannot be renamed"
    if options.names == "kept" and _apart(kept, layer):
        return "it lies on another filesystem, from where no rename leads to the kept name"
    if isinstance(layer, Qcow2Layer) and kept.size > layer.size:
        tables = -(-kept.size // (layer.cluster_size * layer.tables.per_table))
        if tables * 8 > MAX_L1_BYTES:
            return (
                f"{layer.path.name} cannot grow to {kept.size} bytes: its L1 table would be larger "
                f"than {MAX_L1_BYTES} bytes"
            )
    below = layers[target + 1].size if target + 1 < len(layers) else 0
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
    model: TimeModel,
    keep_files: bool,
    exact: bool,
) -> Candidate:
    target = group.members[position]
    layer = layers[target]
    reads = traffic.commit_bytes + traffic.pull_read_bytes
    written = traffic.commit_bytes + traffic.pull_bytes
    grown = growth(layer, traffic.new_clusters + traffic.new_tables, layers[group.kept].size)
    freed = 0
    if not keep_files:
        freed = sum(layers[index].file.disk_size for index in group.members if index != target)
    pulls = position < len(group.members) - 1
    requests = -(-traffic.commit_bytes // (1 << 20)) + traffic.extents
    seconds = model.seconds(
        read=reads,
        written=written,
        requests=requests if position else 0,
        serial_requests=traffic.extents if pulls else 0,
        files=len(layers) - group.kept,
        commands=(1 if position else 0) + (3 if pulls else 0),
    )
    return Candidate(
        strategy_of(position, len(group.members)),
        "qemu-img",
        target,
        None,
        reads,
        written,
        traffic.extents,
        grown,
        grown,
        freed,
        round(seconds, 3),
        traffic,
        # Only a pull compares.
        exact or not (traffic.pull_bytes or traffic.unsure_bytes),
    )


def candidates_of(
    layers: Sequence[Layer],
    group: Group,
    options: MergeOptions,
    model: TimeModel = DEFAULT,
    progress: Callable[[int, int], None] | None = None,
    behaviour: Behaviour = DEFAULT_BEHAVIOUR,
) -> list[Candidate]:
    """Every target of the group, from the kept image down, and the copy.

    Raises: `ImageError` when the contents cannot be read (`options.exact`).
    """
    members = [layers[index] for index in group.members]
    reasons = [obstacle(layers, group, target, options) for target in group.members]
    figures = count_traffic(
        members,
        range(len(members)),
        () if group.below is None else layers[group.below :],
        progress,
        exact=options.exact,
        behaviour=behaviour,
    )
    out = []
    for position, (traffic, reason) in enumerate(zip(figures, reasons, strict=True)):
        found = _figures(layers, group, position, traffic, model, options.keep_files, options.exact)
        if reason is not None:
            names = (name for name in Candidate.__slots__ if name != "reason")
            found = Candidate(reason=reason, **{name: getattr(found, name) for name in names})
        out.append(found)
    out.append(Candidate("copy", "qemu-img", None, "copies come with a later version"))
    return out


def choose(candidates: Sequence[Candidate], prefer: str) -> Candidate | None:
    """The best feasible candidate; None if there is none.

    By estimated seconds, then bytes written; `prefer` "writes" or "space" puts bytes
    written, or peak space, first.
    """

    def rank(candidate: Candidate) -> tuple[float, ...]:
        time, writes = candidate.seconds, float(candidate.write_bytes)
        space = float(candidate.peak_extra_bytes)
        return {
            "time": (time, writes, space),
            "writes": (writes, time, space),
            "space": (space, time, writes),
        }[prefer]

    feasible = [candidate for candidate in candidates if candidate.feasible]
    return min(feasible, key=rank, default=None)
