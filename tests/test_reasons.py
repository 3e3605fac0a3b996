"""The one sentence of a plan: the numbers that decided, each as counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from merging import build

from fixtures.oracle import qemu_map
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Request

CASES = [
    (
        ["[size=2M] 2M:A", "1600k:B", "1536k:C 448k:-"], ("l1.qcow2",), {"prefer": "writes"},
        ("l2.qcow2 overwrites 96 % of l1.qcow2; pulling into l2.qcow2 moves 64.0 KiB, "
        "committing into l1.qcow2 1.5 MiB"),
    ),
    (
        ["[size=2M] 2M:A", "64k:B", "64k:- 1M:C", "1088k:- 128k:D"], ("l1.qcow2", "l2.qcow2"),
        {"prefer": "writes"},
        ("l2.qcow2 holds 84 % of what the 3 images show; merging into l2.qcow2 moves 192 KiB, "
        "committing into l1.qcow2 1.1 MiB, pulling into l3.qcow2 1.1 MiB"),
    ),
    (
        # For little the number of commands decides.
        ["[size=2M] 2M:A", "1600k:B", "1536k:C 448k:-"], ("l1.qcow2",), {},
        ("l2.qcow2 overwrites 96 % of l1.qcow2; committing into l1.qcow2 takes an estimated "
        "0.035 s for 1.5 MiB, pulling into l2.qcow2 0.069 s for 64.0 KiB"),
    ),
    (
        ["[size=2M] 2M:A", "1M:B", "1M:- 64k:C"], ("l1.qcow2",), {"strategy": "pull"},
        ("l2.qcow2 overwrites 0 % of l1.qcow2; pulling into l2.qcow2 moves 1.0 MiB, and is the "
        "only way asked for"),
    ),
    (
        ["[size=2M] 2M:A", "1M:B", "64k:C"], ("l1.qcow2",), {"prefer": "writes"},
        ("l2.qcow2 overwrites 6 % of l1.qcow2; committing into l1.qcow2 moves 64.0 KiB, pulling "
        "into l2.qcow2 960 KiB"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "drop", "options", "said"), CASES)
def test_what_is_said(
    tmp_path: Path, lines: list[str], drop: tuple[str, ...], options: dict[str, str], said: str
) -> None:
    disk = build(tmp_path, lines)
    plan = disk.plan(Request(drop=drop), MergeOptions(**options))  # type: ignore[arg-type]
    (group,) = plan.as_json()["groups"]  # type: ignore[misc]
    assert group["why"].startswith(said), group["why"]


@pytest.mark.parametrize("drop", [("l1.qcow2",), ("base.qcow2", "l1.qcow2")])
def test_a_copy_writes_what_was_said(tmp_path: Path, drop: tuple[str, ...]) -> None:
    """What the kept image holds and what is pulled (flattened: all that shows), and no more."""
    lines = ["[size=2M] 1M:A 512k:- 128k:A", "[cluster=16k] 64k:- 512k:B", "256k:C 64k:0 64k:C"]
    disk = build(tmp_path, lines)
    options = MergeOptions(strategy="copy")
    plan, _ = disk.merge(drop, options)
    (group,) = plan.groups
    assert group.chosen is not None and group.chosen.strategy == "copy"
    own = [each for each in qemu_map(disk.active) if each["depth"] == 0 and each["data"]]
    assert group.chosen.write_bytes == sum(each["length"] for each in own)
    size = disk.active.stat().st_size
    assert size <= group.chosen.target_growth_bytes <= size + (512 << 10)
