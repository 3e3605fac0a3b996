"""The predicted bytes against what qemu-img requests, by its own trace."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from merging import build

from fixtures.generate import chains
from fixtures.language import LayerSpec, Run, resolve_sizes
from fixtures.trace import Requests, requests, tracing_qemu_img
from qchain.chain.chain import open_chain
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.run.execute import execute
from qchain.run.qemu_img import QemuImg

COUNT = int(os.environ.get("QCHAIN_TRACED", "40"))
STRATEGIES = ("pull", "commit", "both")
MANY = settings(
    max_examples=COUNT, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


def unique(layers: list[LayerSpec]) -> list[LayerSpec]:
    """The same chain, no two layers with the same data, and no data that is zero.

    So each writes whole (sub)clusters: what fills up one that is written in part comes from
    below. (Zero clusters stay; a layer of version 2 has none and would write zeroes.)
    """
    out: list[LayerSpec] = []
    for number, (spec, size) in enumerate(zip(layers, resolve_sizes(layers), strict=True)):
        letter = chr(ord("A") + number)
        unit = 4096 if spec.format == "raw" else spec.cluster_size
        # Among subclusters zeroes over a compressed cluster become data.
        packs = spec.extended_l2 and any(run.compressed for one in spec.passes for run in one)
        zeroes = spec.version == 3 and not packs
        fine = unit // 32 if spec.extended_l2 else unit
        passes = []
        for one in spec.passes:
            runs: list[Run] = []
            offset = 0
            for run in one:
                # Only whole clusters are compressed.
                packed = run.compressed and offset % unit == 0
                each = unit if packed else fine
                length = min(-(-run.length // each) * each, size - offset)
                if length > 0:
                    kind = letter.lower() if packed else letter
                    if run.kind == "-" or (run.kind in "0+~" and zeroes):
                        kind = run.kind
                    runs.append(Run(length, kind))
                    offset += length
            passes.append(tuple(runs))
        if spec.format == "raw":
            # qemu-img writes the first block of a new raw image.
            passes.append((Run(min(4096, size), letter),))
        # What preallocation made is zero.
        out.append(replace(spec, passes=tuple(passes), size=size, preallocation=None))
    return out


@dataclass
class Outcome:
    """Sums over all groups of a merge: predicted bytes, and what qemu-img asked for."""

    read: int
    written: int
    real: Requests


def merged(
    layers: list[LayerSpec], drop: list[bool], strategy: str, exact: bool = False
) -> Outcome | None:
    """Plan and merge in scratch directories, by another strategy where that is not possible.

    None where none is.
    """
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        disk = build(Path(a), layers)
        below = disk.paths[:-1]
        names = [p.name for p, gone in zip(below, drop, strict=False) if gone] or [below[-1].name]
        with open_chain(disk.active) as chain:
            for each in (strategy, *STRATEGIES):
                options = MergeOptions(
                    strategy=each, names="target", allow_format_change=True, exact=exact
                )
                plan = make_plan(chain, Request(drop=tuple(names)), options)
                if not plan.refusals:
                    break
            else:
                return None
            execute(plan, chain, QemuImg(tracing_qemu_img(Path(b))))
        chosen = [group.chosen for group in plan.groups if group.chosen is not None]
        event(" ".join(candidate.strategy for candidate in chosen))
        return Outcome(
            sum(candidate.read_bytes for candidate in chosen),
            sum(candidate.write_bytes for candidate in chosen),
            requests(Path(b)),
        )


DROPS = st.lists(st.booleans(), min_size=4, max_size=4)
CHAINS = chains(min_layers=2, max_layers=4)


@MANY
@given(layers=CHAINS, drop=DROPS, strategy=st.sampled_from(STRATEGIES))
def test_unique_contents_are_predicted_exactly(
    layers: list[LayerSpec], drop: list[bool], strategy: str
) -> None:
    found = merged(unique(layers), drop, strategy)
    if found is not None:
        assert (found.read, found.written) == (found.real.read, found.real.written)


@MANY
@given(layers=CHAINS, drop=DROPS, strategy=st.sampled_from(STRATEGIES))
def test_any_contents_are_predicted_at_most(
    layers: list[LayerSpec], drop: list[bool], strategy: str
) -> None:
    """Where contents repeat."""
    found = merged(layers, drop, strategy)
    if found is not None:
        assert found.read >= found.real.read and found.written >= found.real.written


@MANY
@given(layers=CHAINS, drop=DROPS, strategy=st.sampled_from(STRATEGIES))
def test_with_exact_any_contents_are_predicted_exactly(
    layers: list[LayerSpec], drop: list[bool], strategy: str
) -> None:
    found = merged(layers, drop, strategy, exact=True)
    if found is not None:
        assert (found.read, found.written) == (found.real.read, found.real.written)
