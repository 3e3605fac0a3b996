"""Where files lie and what lies beside them: what a merge could not do to its end is refused.

Each of these once failed after the switch, or on every try to finish it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from merging import build
from test_merge_refusals import LINES, chain_in, plan_of, state

from fixtures.oracle import qemu_img, raw_of
from qchain.chain.chain import open_chain
from qchain.chain.gate import Gate
from qchain.plan.options import MergeOptions
from qchain.plan.plan import make_plan
from qchain.plan.selection import Request
from qchain.run.execute import execute

# --- one filesystem, mounted at several places ---------------------------------------------


@contextlib.contextmanager
def mounted(*places: tuple[Path, Path]) -> Iterator[None]:
    """Bind mounts (what, where)."""
    with contextlib.ExitStack() as stack:
        for what, where in places:
            subprocess.run(["mount", "--bind", what, where], check=True, capture_output=True)
            stack.callback(subprocess.run, ["umount", where], check=True)
        yield


def can_mount() -> bool:
    return (
        os.getuid() == 0
        and not subprocess.run(
            ["unshare", "-m", "true"], capture_output=True, check=False
        ).returncode
    )


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs root")


@needs_mount
@pytest.mark.parametrize(("strategy", "names"), [("commit", "kept"), ("pull", "lowest")])
def test_no_rename_leads_from_one_mount_to_another(
    tmp_path: Path, strategy: str, names: str
) -> None:
    """The same device, and yet rename says EXDEV: another way, or none."""
    for name in ("a", "b", "mount-a", "mount-b"):
        (tmp_path / name).mkdir()
    with mounted((tmp_path / "a", tmp_path / "mount-a"), (tmp_path / "b", tmp_path / "mount-b")):
        disk = chain_in(tmp_path / "mount-b")
        top = tmp_path / "mount-a" / "top.qcow2"
        (tmp_path / "b" / "top.qcow2").rename(tmp_path / "a" / "top.qcow2")
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", "../mount-b/mid.qcow2", "-F", "qcow2", top)
        before = state(tmp_path)
        gate = Gate(allow=(tmp_path,))
        options = MergeOptions(strategy=strategy, names=names)
        refusals = plan_of(top, ["mid.qcow2"], options, gate)
        assert len(refusals) == 1 and "another filesystem" in refusals[0], refusals
        assert state(tmp_path) == before
        with open_chain(top, gate) as chain:
            plan = make_plan(chain, Request(drop=("mid.qcow2",)))
            assert not plan.refusals
            execute(plan, chain)
        assert raw_of(top) == disk.points["top.qcow2"]


@needs_mount
def test_a_file_that_is_a_mount_point(tmp_path: Path) -> None:
    """It cannot be renamed nor removed (EBUSY)."""
    (tmp_path / "images").mkdir()
    disk = build(tmp_path / "images", LINES, ("base", "mid", "top"))
    mid = tmp_path / "images" / "mid.qcow2"
    mid.rename(tmp_path / "elsewhere")
    mid.touch()
    with mounted((tmp_path / "elsewhere", mid)):
        refusals = plan_of(disk.active, ["mid.qcow2"])
    assert len(refusals) == 1 and "mount point" in refusals[0], refusals
