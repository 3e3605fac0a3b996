"""A merge that is done is done, whether or not anybody can be told of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_runner import COMMAND
from merging import Disk, build
from test_recover import killed_before

from qchain.plan.options import MergeOptions

LAYERS = ["512k:A 512k:-", "64k:- 256k:B 704k:-", "[cluster=4k] 4k:C 1020k:-"]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return build(tmp_path / "d", LAYERS)


@contextmanager
def nowhere(kind: str) -> Iterator[int]:
    """A descriptor that nothing can be written to: a full disk, or a pipe without a reader."""
    if kind == "full":
        fd = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, fd = os.pipe()
        os.close(reader)
    try:
        yield fd
    finally:
        os.close(fd)


def told_nobody(kind: str, *words: str | Path) -> tuple[int, str]:
    with nowhere(kind) as fd:
        done = subprocess.run(
            [COMMAND, *words], stdin=subprocess.DEVNULL, stdout=fd, stderr=subprocess.PIPE,
            text=True, check=False,
        )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_merge_that_nobody_hears_of(disk: Disk, kind: str) -> None:
    code, err = told_nobody(kind, "merge", "--json", "--yes", "--drop", "l1.qcow2", disk.active)
    assert code == 0, err
    if kind == "full":
        assert err.count("\n") == 1
        assert err.startswith("qchain: output: cannot be written") and "merge is done" in err
    else:
        assert err == ""
    disk.expect({"base.qcow2": "base.qcow2", "l2.qcow2": "l2.qcow2"})


@pytest.mark.parametrize("kind", ["full", "closed"])
@pytest.mark.parametrize("json", [(), ("--json",)])
@pytest.mark.parametrize("unfinished", [True, False])
def test_a_recovery_that_nobody_hears_of(
    disk: Disk, kind: str, json: tuple[str, ...], unfinished: bool
) -> None:
    if unfinished:
        killed_before(disk, ("l1.qcow2",), MergeOptions(strategy="commit"), 5)
    code, err = told_nobody(kind, "recover", *json, disk.directory)
    assert code == 0, err
    assert ("nothing is left to recover" in err) == (kind == "full")
    if unfinished:
        disk.expect({"base.qcow2": "base.qcow2", "l2.qcow2": "l2.qcow2"})
