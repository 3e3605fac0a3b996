"""Random chains, drop sets, strategies and names: the shadow model and qemu-img judge."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from merging import build

from fixtures.generate import chains
from fixtures.language import LayerSpec
from qchain.chain.chain import open_chain
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.run.execute import execute

SLOW = settings(
    max_examples=70,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@SLOW
@given(
    layers=chains(min_layers=2, max_layers=5),
    picks=st.lists(st.booleans(), min_size=5, max_size=5),
    strategy=st.sampled_from(["auto", "pull", "commit", "both", "copy"]),
    names=st.sampled_from(["kept", "lowest", "target"]),
    verify=st.sampled_from(["moved", "full"]),
)
def test_every_kept_point_reads_the_same(
    layers: list[LayerSpec], picks: list[bool], strategy: str, names: str, verify: str
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        disk = build(Path(temporary), layers)
        drop = [p.name for p, pick in zip(disk.paths[:-1], picks, strict=False) if pick]
        assume(drop)
        options = MergeOptions(
            strategy=strategy, names=names, verify=verify, allow_format_change=True
        )
        with open_chain(disk.active) as chain:
            plan = make_plan(chain, Request(drop=tuple(drop)), options)
            if plan.refusals:
                event(f"refused: {plan.refusals[0].split(': ', 1)[1][:40]}")
                disk.expect({p.name: p.name for p in disk.paths})
                return
            result = execute(plan, chain)
        assert result.identical
        disk.expect(disk.after(plan))
