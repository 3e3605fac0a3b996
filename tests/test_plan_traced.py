"""The predicted bytes against what qemu-img requests, by its own trace."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from merging import build

from fixtures.generate import SMALL_CLUSTERS, chains, layer_specs
from fixtures.language import LayerSpec, Run, resolve_size, resolve_sizes
from fixtures.trace import Requests, requests, tracing_qemu_img
from qchain.chain.chain import open_chain
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.run.execute import execute
from qchain.run.qemu_img import QemuImg

COUNT = int(os.environ.get("QCHAIN_TRACED", "60"))
MANY = settings(
    max_examples=COUNT, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


def unique(layers: list[LayerSpec]) -> list[LayerSpec]:
    """The same chain, no two layers with the same data, no zeroes, and nothing but whole clusters.

    (What fills up a cluster that is written in part comes from below: it repeats.)
    """
    out: list[LayerSpec] = []
    for number, (spec, size) in enumerate(zip(layers, resolve_sizes(layers), strict=True)):
        letter = chr(ord("A") + number)
        unit = 4096 if spec.format == "raw" else spec.cluster_size
        passes = []
        for one in spec.passes:
            runs: list[Run] = []
            offset = 0
            for run in one:
                length = min(-(-run.length // unit) * unit, size - offset)
                if length > 0:
                    kind = "-" if run.letter is None else letter
                    runs.append(Run(length, kind.lower() if run.compressed else kind))
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


def merged(layers: list[LayerSpec], drop: list[bool], strategy: str) -> Outcome | None:
    """Plan and merge in scratch directories; None where there is nothing to be merged so."""
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        disk = build(Path(a), layers)
        names = [p.name for p, gone in zip(disk.paths[:-1], drop, strict=False) if gone]
        if not names:
            return None
        options = MergeOptions(strategy=strategy, names="target", allow_format_change=True)
        with open_chain(disk.active) as chain:
            plan = make_plan(chain, Request(drop=tuple(names)), options)
            if plan.refusals:
                return None
            execute(plan, chain, QemuImg(tracing_qemu_img(Path(b))))
        chosen = [group.chosen for group in plan.groups if group.chosen is not None]
        event(" ".join(candidate.strategy for candidate in chosen))
        return Outcome(
            sum(candidate.read_bytes for candidate in chosen),
            sum(candidate.write_bytes for candidate in chosen),
            requests(Path(b)),
        )


@st.composite
def even_chains(draw: st.DrawFn) -> list[LayerSpec]:
    """One cluster size, none shorter than what is below (past its end it would be zero)."""
    cluster = draw(st.sampled_from(SMALL_CLUSTERS))
    specs: list[LayerSpec] = []
    below: int | None = None
    for _ in range(draw(st.integers(2, 4))):
        spec = replace(
            draw(layer_specs(below, cluster_size=cluster)), extended_l2=False, preallocation=None
        )
        if below is not None and spec.size is not None and spec.size < below:
            # A compressed run may end with the disk only.
            loud = tuple(tuple(Run(r.length, r.kind.upper()) for r in one) for one in spec.passes)
            spec = replace(spec, size=below, passes=loud)
        specs.append(spec)
        below = resolve_size(spec, below)
    return specs


DROPS = st.lists(st.booleans(), min_size=4, max_size=4)
STRATEGIES = st.sampled_from(["pull", "commit", "both"])


@MANY
@given(layers=even_chains(), drop=DROPS, strategy=STRATEGIES)
def test_unique_contents_are_predicted_exactly(
    layers: list[LayerSpec], drop: list[bool], strategy: str
) -> None:
    found = merged(unique(layers), drop, strategy)
    if found is not None:
        assert (found.read, found.written) == (found.real.read, found.real.written)


@MANY
@given(layers=chains(min_layers=2, max_layers=4), drop=DROPS, strategy=STRATEGIES)
def test_any_contents_are_predicted_at_most(
    layers: list[LayerSpec], drop: list[bool], strategy: str
) -> None:
    """Where contents repeat, and where small clusters are pulled into large ones."""
    found = merged(layers, drop, strategy)
    if found is not None:
        assert found.read >= found.real.read and found.written >= found.real.written
