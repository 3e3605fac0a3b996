"""A group merged into a new file by the native engine: the shadow model and qemu-img judge."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from merging import build
from stopping import killed

from fixtures.generate import chains
from fixtures.language import LayerSpec, parse_layer
from fixtures.oracle import qemu_info, qemu_map
from qchain.chain.chain import open_chain
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import NativeCopy
from qchain.run.execute import execute
from qchain.run.recover import journals_at, recover

EXAMPLES = int(os.environ.get("QCHAIN_NATIVE", "15"))
COPY = MergeOptions(strategy="copy", engine="native")


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    layers=chains(min_layers=2, max_layers=5),
    picks=st.lists(st.booleans(), min_size=5, max_size=5),
    names=st.sampled_from(["kept", "lowest"]),
)
def test_every_kept_point_reads_the_same(
    layers: list[LayerSpec], picks: list[bool], names: str
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        disk = build(Path(temporary), layers)
        drop = [p.name for p, pick in zip(disk.paths[:-1], picks, strict=False) if pick]
        assume(drop)
        options = MergeOptions(
            strategy="copy", engine="native", names=names, allow_format_change=True
        )
        with open_chain(disk.active) as chain:
            plan = make_plan(chain, Request(drop=tuple(drop)), options)
            if plan.refusals:
                event(f"refused: {plan.refusals[0].split(': ', 1)[1][:40]}")
                disk.expect({p.name: p.name for p in disk.paths})
                return
            foreseen = [group.chosen for group in plan.groups]
            result = execute(plan, chain)
        assert result.identical
        disk.expect(disk.after(plan))
        for group, chosen in zip(plan.groups, foreseen, strict=True):
            assert chosen is not None and chosen.engine == "native" and group.result is not None
            assert group.result.stat().st_size == chosen.target_growth_bytes


FEATURES = {
    "standard": "[cluster=64k] 64k:A 64k:0 128k:-",
    "subclusters": "[ext cluster=64k] 2k:A 62k:- 4k:0 60k:- 128k:-",
    "old": "[v2 cluster=4k] 64k:A 192k:-",
    "zstd": "[zstd] 64k:a 192k:-",
    "narrow refcounts": "[refcount=1] 64k:A 192k:-",
    "wide refcounts": "[refcount=64 lazy] 64k:A 192k:-",
    "smallest clusters": "[cluster=512] 1k:A 255k:-",
}


@pytest.mark.parametrize("upper", FEATURES.values(), ids=list(FEATURES))
def test_the_features_of_the_kept_image(tmp_path: Path, upper: str) -> None:
    disk = build(tmp_path, [parse_layer(each) for each in ("256k:A", "64k:- 64k:B 128k:-", upper)])
    before = qemu_info(disk.active)
    mid = disk.paths[1].name
    disk.merge([mid], COPY)
    after = qemu_info(disk.active)
    assert after["format-specific"] == before["format-specific"]
    assert after["cluster-size"] == before["cluster-size"]
    assert after["backing-filename"] == disk.paths[0].name
    assert after["backing-filename-format"] == "qcow2"
    disk.expect({disk.paths[0].name: disk.paths[0].name, disk.active.name: disk.active.name})


def test_compressed_and_zero_clusters_stay_what_they_are(tmp_path: Path) -> None:
    lines = ["1M:A", "128k:a 128k:- 192k:b 64k:0 512k:-", "64k:- 64k:0 64k:c 832k:-"]
    disk = build(tmp_path, [parse_layer(line) for line in lines])
    disk.merge([disk.paths[1].name], COPY)
    found = [
        (each["start"] >> 16, each["length"] >> 16, each["data"], each.get("compressed", False))
        for each in qemu_map(disk.active)
        if each["depth"] == 0
    ]
    # qemu-img tells a compressed cluster where it has no offset.
    assert [(start, count, data) for start, count, data, _ in found if not data] == [
        (1, 1, False),
        (7, 1, False),
    ]
    assert {start for start, _, data, _ in found if data} >= {0, 2, 4}
    packed = [each for each in qemu_map(disk.active) if each["data"] and "offset" not in each]
    assert sum(each["length"] for each in packed) == 5 << 16
    disk.expect({path.name: path.name for path in (disk.paths[0], disk.active)})


def test_killed_while_it_is_written(tmp_path: Path) -> None:
    lines = ["256k:A", "64k:- 64k:B 128k:-", "64k:C 192k:-"]
    for number in range(16):
        place = tmp_path / str(number)
        place.mkdir()
        disk = build(place, [parse_layer(line) for line in lines])
        with open_chain(disk.active) as chain:
            plan = make_plan(chain, Request(drop=(disk.paths[1].name,)), COPY)
            assert any(isinstance(step, NativeCopy) for step in plan.steps)
            if not killed(plan, chain, lambda seen, _, number=number: seen == number):
                assert number == len(plan.steps)
                break
        disk.expect({disk.active.name: disk.active.name}, complete=False)
        recover(journals_at(place))
        disk.expect({path.name: path.name for path in (disk.paths[0], disk.active)})
    else:
        pytest.fail("it has more steps than that")
