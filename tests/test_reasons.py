"""The one sentence of a plan: the numbers that decided, each as counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from merging import build

from fixtures.oracle import qemu_io, qemu_map, raw_of
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Request

SPACE = ["[size=8M] 8M:A", "8M:B", "6M:C"]

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
        "pulling into l3.qcow2 1.1 MiB, committing into l1.qcow2 1.1 MiB"),
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
    (
        SPACE, ("l1.qcow2",), {"prefer": "writes"},
        ("l2.qcow2 overwrites 75 % of l1.qcow2; pulling into l2.qcow2 moves 2.0 MiB, committing "
        "into l1.qcow2 6.0 MiB"),
    ),
    (
        # The bytes are the same; the time decides, and is said to.
        ["[size=2M] 2M:A", "64k:B", "64k:- 64k:C"], ("l1.qcow2",), {"prefer": "writes"},
        ("l2.qcow2 overwrites 0 % of l1.qcow2; no way moves less than 64.0 KiB; committing into "
        "l1.qcow2 takes an estimated 0.029 s for 64.0 KiB, pulling into l2.qcow2 0.069 s for "
        "64.0 KiB"),
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


def test_space_decides(tmp_path: Path) -> None:
    """More is moved, but into clusters that are there: what is said is the space."""
    disk = build(tmp_path, SPACE)
    plan = disk.plan(Request(drop=("l1.qcow2",)), MergeOptions(prefer="space"))
    (group,) = plan.as_json()["groups"]  # type: ignore[misc]
    needs = {each["strategy"]: each["peak_extra_bytes"] for each in group["candidates"]}
    commit, pull = f"{needs['commit'] / 1024:.0f} KiB", f"{needs['pull'] / 1024 / 1024:.1f} MiB"
    assert group["chosen"] == "commit"
    assert group["why"] == (
        "l2.qcow2 overwrites 75 % of l1.qcow2; committing into l1.qcow2 needs "
        f"{commit} of extra space, pulling into l2.qcow2 {pull}"
    )


@pytest.mark.parametrize("drop", [("l1.qcow2",), ("base.qcow2", "l1.qcow2")])
def test_a_copy_writes_what_was_said(tmp_path: Path, drop: tuple[str, ...]) -> None:
    """What the kept image holds and what is pulled (flattened: all that shows), and no more."""
    lines = ["[size=2M] 1M:A 512k:- 128k:A", "[cluster=16k] 64k:- 512k:B", "256k:C 64k:0 64k:C"]
    disk = build(tmp_path, lines)
    options = MergeOptions(strategy="copy")
    plan, _ = disk.merge(drop, options)
    (group,) = plan.groups
    assert group.chosen is not None and group.chosen.strategy == "copy"
    assert not group.chosen.exact
    own = [each for each in qemu_map(disk.active) if each["depth"] == 0 and each["data"]]
    assert group.chosen.write_bytes == sum(each["length"] for each in own)
    size = disk.active.stat().st_size
    assert size <= group.chosen.target_growth_bytes <= size + (512 << 10)


def test_a_copy_leaves_out_zeroes_in_data(tmp_path: Path) -> None:
    """So what is said is the most, with `--exact` too."""
    disk = build(tmp_path, ["[size=2M] 1M:A", "64k:B", "64k:C 960k:D"])
    qemu_io(disk.active, ["write -q -P 0 128k 512k"], "qcow2")
    disk.points[disk.active.name] = raw_of(disk.active)
    plan, _ = disk.merge(("l1.qcow2",), MergeOptions(strategy="copy", exact=True))
    chosen = plan.groups[0].chosen
    assert chosen is not None and not chosen.exact and chosen.write_bytes == 1 << 20
    own = [each for each in qemu_map(disk.active) if each["depth"] == 0 and each["data"]]
    assert sum(each["length"] for each in own) == 512 << 10
