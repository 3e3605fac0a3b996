"""Merges in place by the native engine: the shadow model and qemu-img judge."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from merging import Disk, build

from fixtures.generate import chains
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_img
from qchain.chain.chain import open_chain
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.run.execute import execute

EXAMPLES = int(os.environ.get("QCHAIN_NATIVE", "20"))


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    layers=chains(min_layers=2, max_layers=5),
    picks=st.lists(st.booleans(), min_size=5, max_size=5),
    strategy=st.sampled_from(["auto", "pull", "commit", "both"]),
    names=st.sampled_from(["kept", "lowest", "target"]),
    verify=st.sampled_from(["moved", "full", "manifest"]),
)
def test_every_kept_point_reads_the_same(
    layers: list[LayerSpec], picks: list[bool], strategy: str, names: str, verify: str
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        disk = build(Path(temporary), layers)
        drop = [p.name for p, pick in zip(disk.paths[:-1], picks, strict=False) if pick]
        assume(drop)
        options = MergeOptions(
            strategy=strategy,
            engine="native",
            names=names,
            verify=verify,
            allow_format_change=True,
        )
        with open_chain(disk.active) as chain:
            plan = make_plan(chain, Request(drop=tuple(drop)), options)
            if plan.refusals:
                event(f"refused: {plan.refusals[0].split(': ', 1)[1][:40]}")
                disk.expect({p.name: p.name for p in disk.paths})
                return
            assert all(group.chosen and group.chosen.engine == "native" for group in plan.groups)
            event("merged")
            result = execute(plan, chain)
        assert result.identical
        disk.expect(disk.after(plan))


def _reasons(disk: Disk, options: MergeOptions, request: Request) -> dict[str, str | None]:
    plan = disk.plan(request, options)
    return {
        candidate.strategy: candidate.reason
        for group in plan.groups
        for candidate in group.candidates
        if candidate.engine == "native"
    }


def test_another_target_where_one_is_raw(tmp_path: Path) -> None:
    disk = build(tmp_path, ["[raw] 256k:A", "64k:B 192k:-", "64k:- 64k:C 128k:-"])
    options = MergeOptions(engine="native", allow_format_change=True)
    reasons = _reasons(disk, options, Request(flatten=True))
    assert "base.raw is raw: the native engine writes qcow2" in (reasons["commit"] or "")
    assert reasons["pull"] is None and reasons["both"] is None
    plan, _ = disk.merge((), options, request=Request(flatten=True))
    assert plan.groups[0].chosen is not None and plan.groups[0].chosen.engine == "native"
    disk.expect({disk.active.name: disk.active.name})


def test_bitmaps_that_would_change_are_refused_by_name(tmp_path: Path) -> None:
    disk = build(tmp_path, ["256k:A", "64k:B 192k:-", "64k:- 64k:C 128k:-"])
    for path in disk.paths[1:]:
        qemu_img("bitmap", "--add", "-f", "qcow2", path, "b")
    drop = Request(drop=(disk.paths[1].name,))
    for mode in ("carry", "drop"):
        reasons = _reasons(disk, MergeOptions(engine="native", bitmaps=mode), drop)
        assert all("has bitmaps" in (reasons[way] or "") for way in ("pull", "commit")), reasons
    disk.expect({path.name: path.name for path in disk.paths})


def test_a_header_without_room(tmp_path: Path) -> None:
    """Old and new backing name do not both fit the first cluster, of 1024 bytes."""
    place = tmp_path / ("x" * 200) / ("y" * 200)
    place.mkdir(parents=True)
    disk = build(place, ["64k:A", "[cluster=1k] 4k:B 60k:-", "[cluster=1k] 60k:- 4k:C"])
    for below, path in zip(disk.paths, disk.paths[1:], strict=False):
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", below, "-F", "qcow2", path)
    drop = Request(drop=(disk.paths[1].name,))
    reasons = _reasons(disk, MergeOptions(engine="native"), drop)
    assert "no room for a backing name" in (reasons["pull"] or ""), reasons
    refused = disk.plan(drop, MergeOptions(engine="native", strategy="pull")).refusals
    assert len(refused) == 1 and "no room for a backing name" in refused[0]
    disk.expect({path.name: path.name for path in disk.paths})


@pytest.mark.parametrize("size", [2 << 20, 9 << 20])
def test_a_refcount_table_that_is_full(tmp_path: Path, size: int) -> None:
    """512-byte clusters: one cluster of the table counts 8 MiB of the file."""
    disk = build(
        tmp_path,
        [f"[cluster=512 size={size >> 20}M] {size >> 20}M:A", "64k:B", "[cluster=512] 4k:- 4k:C"],
    )
    options = MergeOptions(engine="native", strategy="pull")
    disk.merge((), options, request=Request(flatten=True))
    disk.expect({disk.active.name: disk.active.name})
