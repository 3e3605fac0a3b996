"""Trees of linked clones: planned as by brute force, merged, killed and recovered."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from cli_runner import run
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from merging import Disk
from stopping import killed

from fixtures.build import build_tree
from fixtures.generate import trees
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_img, raw_of
from fixtures.shadow import shadow_tree
from qchain.chain.chain_tree import ChainTree, open_tree
from qchain.errors import ImageError, UsageError
from qchain.plan.heirs import Cost, assign
from qchain.plan.options import MergeOptions
from qchain.plan.order import Job, least_peak_order, peak_of
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Group, Request, groups_of
from qchain.plan.steps import MakeDirectory, Step
from qchain.run.execute import execute
from qchain.run.recover import journals_at, recover

SLOW = settings(
    max_examples=35, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip

# base <- shared <- low <- x, y; shared <- z
CLONES = {
    "base": (None, "256k:A"),
    "shared": ("base", "64k:B 64k:- 64k:B"),
    "low": ("shared", "64k:- 64k:C"),
    "x": ("low", "192k:- 64k:X"),
    "y": ("low", "64k:Y"),
    "z": ("shared", "128k:- 64k:Z"),
}


def grown(directory: Path, tree: dict[str, tuple[str | None, str | LayerSpec]]) -> Disk:
    """The tree on disk; `paths` are in the order of `tree`."""
    built = build_tree(directory, tree)
    points = shadow_tree(tree)
    return Disk(
        directory,
        [built.paths[name] for name in tree],
        {built.paths[name].name: points[name] for name in tree},
    )


def leaves(tree: dict[str, tuple[str | None, object]]) -> list[str]:
    parents = {parent for parent, _ in tree.values()}
    return [name for name in tree if name not in parents]


def found_in(disk: Disk, names: Iterable[str]) -> list[Path]:
    return [path for path in disk.paths if path.stem in set(names)]


@pytest.fixture
def clones(tmp_path: Path) -> Disk:
    (tmp_path / "d").mkdir()
    return grown(tmp_path / "d", CLONES)


# --- who inherits: against brute force ------------------------------------------------------


def shape(seed: int) -> tuple[ChainTree, list[Group]]:
    """A small random tree of images without content, and the groups of a random request."""
    dice = random.Random(seed)
    while True:
        count = dice.randint(2, 9)
        below = (None, *(dice.randrange(max(0, n - 4), n) for n in range(1, count)))
        actives = tuple(n for n in range(count) if n not in below)
        dropped = frozenset(n for n in range(count) if n not in actives and dice.random() < 0.75)
        tree = ChainTree((None,) * count, below, actives)  # type: ignore[arg-type]
        groups = groups_of(dropped, tree)
        if groups and len(groups) <= 6:
            return tree, groups


def brute_force(groups: Sequence[Group], costs: list[list[float]]) -> float:
    """The least cost over all orders: who is last at an image may use it as its target."""
    best = math.inf
    for order in itertools.permutations(range(len(groups))):
        total = 0.0
        for place, number in enumerate(order):
            later = {index for other in order[place + 1 :] for index in groups[other].dropped}
            own = 1
            while own < groups[number].count and groups[number].line[own] not in later:
                own += 1
            total += min(costs[number][:own])
        best = min(best, total)
    return best


@pytest.mark.parametrize("block", range(10))
def test_the_heirs_are_those_of_brute_force(block: int) -> None:
    branching = 0
    for seed in range(block * 400, block * 400 + 400):
        tree, groups = shape(seed)
        dice = random.Random(-seed)
        costs = [[float(dice.randint(0, 30)) for _ in group.members] for group in groups]
        for each in costs:
            if dice.random() < 0.2:
                each[0] = math.inf  # a kept image that cannot receive the data

        def cost(number: int, own: int, costs: list[list[float]] = costs) -> Cost:
            return (min(costs[number][:own]),)

        assigned = assign(tree, groups, cost)
        total = sum(cost(n, each.group.own)[0] for n, each in enumerate(assigned))
        assert total == brute_force(groups, costs), seed
        owned = [index for each in assigned for index in each.group.owned[1:]]
        dropped = {index for group in groups for index in group.dropped}
        assert sorted(owned) == sorted(dropped), "every dropped image has one heir"
        for number, each in enumerate(assigned):
            # Whoever still needs something of a group's own comes before it.
            for other, group in enumerate(groups):
                if other != number and set(group.dropped) & set(each.group.owned[1:]):
                    at: int | None = other
                    while at is not None and at != number:
                        at = assigned[at].before
                    assert at == number, seed
        branching += len(groups) > 1
    assert branching > 100


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(-12, 12), st.integers(-2, 5)),
        min_size=1, max_size=6,
    ),
    st.randoms(use_true_random=False),
)  # fmt: skip
@settings(max_examples=1500, deadline=None)
def test_the_order_has_the_least_peak(
    drawn: list[tuple[int, int, int]], dice: random.Random
) -> None:
    names = list(range(len(drawn)))
    dice.shuffle(names)
    jobs: list[Job] = [Job(0, 0)] * len(drawn)
    for number, (peak, net, before) in enumerate(drawn):
        later = names[before] if 0 <= before < number else None
        jobs[names[number]] = Job(max(peak, net), net, later)

    def allowed(order: Sequence[int]) -> bool:
        place = {number: at for at, number in enumerate(order)}
        return all(
            job.before is None or place[number] < place[job.before]
            for number, job in enumerate(jobs)
        )

    order = least_peak_order(jobs)
    assert allowed(order) and sorted(order) == sorted(names)
    best = min(peak_of(jobs, each) for each in itertools.permutations(names) if allowed(each))
    assert peak_of(jobs, order) == best


# --- merged ---------------------------------------------------------------------------------


@SLOW
@given(
    tree=trees(),
    picks=st.lists(st.booleans(), min_size=7, max_size=7),
    strategy=st.sampled_from(["auto", "auto", "pull", "commit", "both", "copy"]),
    names=st.sampled_from(["kept", "lowest", "target"]),
    prefer=st.sampled_from(["time", "writes", "space"]),
    engine=st.sampled_from(["qemu-img", "native"]),
)
def test_every_kept_point_of_a_tree_reads_the_same(
    tree: dict[str, tuple[str | None, LayerSpec]],
    picks: list[bool],
    strategy: str,
    names: str,
    prefer: str,
    engine: str,
) -> None:
    tops = leaves(tree)
    drop = [name for name, pick in zip(tree, picks, strict=False) if pick and name not in tops]
    assume(drop)
    with tempfile.TemporaryDirectory() as temporary:
        disk = grown(Path(temporary), dict(tree))
        files = [str(path) for path in found_in(disk, drop)]
        options = MergeOptions(
            strategy=strategy, names=names, prefer=prefer, engine=engine, allow_format_change=True
        )
        with open_tree(found_in(disk, tops)) as opened:
            plan = make_plan(opened, Request(drop=tuple(files)), options)
            if plan.refusals:
                event(f"refused: {plan.refusals[0].split(': ', 1)[1][:40]}")
                disk.expect({path.name: path.name for path in disk.paths})
                return
            event(f"{len(plan.groups)} groups, shared: {any(g.group.shared for g in plan.groups)}")
            assert execute(plan, opened).identical
        disk.expect(disk.after(plan))


@pytest.mark.parametrize("names", ["kept", "lowest", "target"])
def test_clones_of_what_is_dropped(clones: Disk, names: str) -> None:
    tops = found_in(clones, ("x", "y", "z"))
    with open_tree(tops) as tree:
        plan = make_plan(
            tree, Request(drop=("low.qcow2", "shared.qcow2")), MergeOptions(names=names)
        )
        assert not plan.refusals
        assert [len(plan.groups), sum(bool(g.group.shared) for g in plan.groups)] == [3, 2]
        execute(plan, tree)
    clones.expect(clones.after(plan))
    assert len(list(clones.directory.iterdir())) == 4


def test_kept_points_inside(clones: Disk) -> None:
    """low stays: x and y go on backing on it, whatever becomes of what is below."""
    with open_tree(found_in(clones, ("x", "y", "z"))) as tree:
        plan = make_plan(tree, Request(drop=("shared.qcow2",)), MergeOptions(names="target"))
        assert not plan.refusals
        execute(plan, tree)
    clones.expect(clones.after(plan))


def test_through_the_command(clones: Disk) -> None:
    tops = found_in(clones, ("x", "y", "z"))
    shown = run("plan", *tops, "--flatten")
    assert shown.code == 0 and "others still back on it" in shown.out
    done = run("merge", *tops, "--flatten", "--yes", "--json")
    assert done.code == 0, done.err
    assert done.json["active"] == [str(path) for path in tops]
    assert done.json["verified"]["identical"]
    clones.expect({path.name: path.name for path in tops})
    for path in tops:
        assert clones.backing_of(path.name)[0] is None


# --- killed ---------------------------------------------------------------------------------


def killed_before(disk: Disk, tops: list[Path], options: MergeOptions, number: int) -> Plan:
    """Merge in a child that is killed before step `number`, if it comes to that."""
    with open_tree(tops) as tree:
        plan = make_plan(tree, Request(drop=("low.qcow2", "shared.qcow2")), options)
        assert not plan.refusals, plan.refusals
        killed(plan, tree, lambda at, _step: at == number)
    return plan


@pytest.mark.parametrize("names", ["kept", "lowest", "target"])
@pytest.mark.parametrize(
    ("strategy", "engine"),
    [*((each, "qemu-img") for each in ("auto", "pull", "copy")), ("auto", "native")],
)
def test_killed_between_steps_and_recovered(
    tmp_path: Path, names: str, strategy: str, engine: str
) -> None:
    if (names, strategy) == ("target", "copy"):
        strategy = "pull"  # a copy has no name of its own
    options = MergeOptions(names=names, strategy=strategy, engine=engine)
    stride = 1 if "QCHAIN_TORTURE" in os.environ else 9
    number, count = len(names + strategy) % stride, None
    while count is None or number < count:
        directory = tmp_path / str(number)
        directory.mkdir()
        disk = grown(directory, CLONES)
        tops = found_in(disk, ("x", "y", "z"))
        plan = killed_before(disk, tops, options, number)
        count = len(plan.steps)
        for group in plan.groups:
            # Under its name, until the name of its result has taken its place.
            kept = plan.layers[group.group.kept].path
            assert group.result is not None
            shown = kept if kept.exists() else group.result
            assert raw_of(shown) == disk.points[kept.name], number
        (done,) = recover(journals_at(directory))
        assert done.outcome == "finished"
        disk.expect(disk.after(plan))
        number += stride


# --- refused --------------------------------------------------------------------------------


def test_an_overlay_that_is_not_named(clones: Disk) -> None:
    x, y = found_in(clones, ("x", "y"))
    said = run("merge", x, y, "--drop", "shared.qcow2", "--yes").fails(3)
    assert "z.qcow2" in said and "backs on shared.qcow2" in said
    clones.expect({path.name: path.name for path in clones.paths})


def test_named_twice(clones: Disk) -> None:
    x, low = found_in(clones, ("x", "low"))
    for pair in ([x, x], [x, low], [low, x]):
        with pytest.raises(UsageError, match="named twice"):
            open_tree(pair)
        assert "named twice" in run("plan", *pair, "--flatten").fails(2)


def test_overlays_that_record_different_formats(clones: Disk) -> None:
    z, x = found_in(clones, ("z", "x"))
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "shared.qcow2", "-F", "raw", z)
    with pytest.raises(ImageError, match="records it as"):
        open_tree([x, z])


def test_what_a_group_frees_is_free_for_the_next(clones: Disk) -> None:
    """Of files without a name nobody may be left who holds them open."""
    ahead: list[list[str]] = []

    def look(step: Step) -> None:
        if isinstance(step, MakeDirectory):
            ahead.append([])
            for link in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # the listing's own
                    ahead[-1].append(str(link.readlink()))

    with open_tree(found_in(clones, ("x", "y", "z"))) as tree:
        plan = make_plan(
            tree, Request(drop=("low.qcow2", "shared.qcow2")), MergeOptions(strategy="auto")
        )
        execute(plan, tree, before_step=look)
    assert len(ahead) == 3
    assert not [name for names in ahead for name in names if "qcow2 (deleted)" in name]


@pytest.mark.parametrize("names", ["kept", "lowest"])
def test_copies_in_two_groups(tmp_path: Path, names: str) -> None:
    """The first one's new file backs on what the second one changes: it is no stranger."""
    chain = {
        "base": (None, "256k:A"),
        "a": ("base", "64k:- 64k:B"),
        "b": ("a", "64k:C"),
        "c": ("b", "192k:- 64k:D"),
    }
    disk = grown(tmp_path, chain)
    plan, _ = disk.merge(["base.qcow2", "b.qcow2"], MergeOptions(strategy="copy", names=names))
    assert len(plan.groups) == 2
    disk.expect(disk.after(plan))
