"""What is told of each version of qemu-img, and what it changes in the figures.

Only the version at hand can be measured (`test_plan_traced.py`); later ones are held against
what their source says: whole (sub)clusters of the target are read, compared and written.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.build import build_chain
from qchain.chain.chain import open_chain
from qchain.plan.traffic import Traffic, count_traffic
from qchain.plan.versions import Version, behaviour_of
from qchain.run.qemu_img import QemuImg

OLD, NEW = (7, 2, 22), (10, 0, 2)


def test_the_version_decides() -> None:
    assert behaviour_of(None) == behaviour_of(OLD) == behaviour_of((6, 0, 0))
    assert behaviour_of((8, 1, 9)) == behaviour_of(OLD)
    assert behaviour_of((8, 2, 0)) == behaviour_of(NEW) != behaviour_of(OLD)
    assert behaviour_of(OLD).measured and not behaviour_of(NEW).measured
    assert behaviour_of(NEW).rebase_compresses and not behaviour_of(OLD).rebase_compresses


def test_the_qemu_img_at_hand_is_one_that_was_measured() -> None:
    """Else the proofs of the figures are proofs of something else."""
    assert behaviour_of(QemuImg().version()).measured


def counted(directory: Path, lines: list[str], version: Version, exact: bool) -> Traffic:
    """The pull of the layer between into the uppermost one."""
    built = build_chain(directory, lines)
    with open_chain(built.active) as chain:
        (found,) = count_traffic(
            chain.layers[:2], [0], chain.layers[2:], exact=exact, behaviour=behaviour_of(version)
        )
    return found


@pytest.mark.parametrize(
    ("lines", "old", "new"),
    [
        # Two clusters of 4K in one of 64K. 7.2 passes over the second.
        (["1M:A", "[cluster=4k] 4k:B 8k:- 4k:B 1008k:-", "1M:-"], (4, 8), (64, 128)),
        # One sector of a cluster differs.
        (["1M:A", "512:B 1023k:-", "1M:-"], (0.5, 128), (64, 128)),
        # Nothing does.
        (["1M:A", "64k:A", "1M:-"], (0, 128), (0, 128)),
        # A new backing that ends within what is read: what follows is read again, as far as it
        # is not in a cluster that has been written to.
        (["[size=96k] 96k:A", "[size=256k] 256k:B", "[size=256k]"], (224, 480), (256, 352)),
    ],
)  # fmt: skip
def test_whole_clusters_from_8_2_on(
    tmp_path: Path, lines: list[str], old: tuple[float, int], new: tuple[float, int]
) -> None:
    """(KiB written, KiB read)"""
    for version, (written, read) in ((OLD, old), (NEW, new)):
        found = counted(tmp_path / str(version), lines, version, exact=True)
        assert (found.pull_bytes, found.pull_read_bytes) == (written * 1024, read * 1024)
        most = counted(tmp_path / f"{version} again", lines, version, exact=False)
        assert most.pull_bytes >= found.pull_bytes
        assert most.pull_read_bytes >= found.pull_read_bytes
