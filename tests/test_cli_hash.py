"""`qchain hash`: the digest of `qemu-img convert -O raw`."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
from cli_runner import command, run
from hypothesis import HealthCheck, given, settings

from fixtures.build import build_chain
from fixtures.generate import chains
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_img, raw_of

LAYERS = [
    "256k:A 1M:- 250k:B 512:A",
    "64k:- 256k:C 64k:0 128k:d 900k:-",
    "[cluster=4k size=10M] 9M:- 1k:E",
]


@pytest.mark.parametrize("base", ["", "[raw] "])
@pytest.mark.parametrize("algorithm", ["sha256", "md5", "blake2b"])
def test_equals_that_of_the_raw_conversion(tmp_path: Path, base: str, algorithm: str) -> None:
    path = build_chain(tmp_path, [base + LAYERS[0], *LAYERS[1:]]).active
    content = raw_of(path)
    expected = hashlib.new(algorithm, content).hexdigest()
    result = run("hash", "--json", "--algorithm", algorithm, path)
    assert result.code == 0
    assert result.json == {
        "algorithm": algorithm,
        "digest": expected,
        "virtual_size": len(content),
    }
    assert run("hash", "--algorithm", algorithm, path).out == f"{expected}  {path}\n"


def test_sha256_is_the_default(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["64k:A 3M:-"]).active
    assert run("hash", path).out.split()[0] == hashlib.sha256(raw_of(path)).hexdigest()


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(layers=chains(min_layers=1, max_layers=4))
def test_random_chains(layers: list[LayerSpec]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        chain = build_chain(Path(temporary), layers)
        fmt = chain.formats[-1]
        expected = hashlib.sha256(raw_of(chain.active, fmt)).hexdigest()
        assert run("hash", "--json", "-f", fmt, chain.active).json["digest"] == expected


@pytest.mark.parametrize("algorithm", ["nonsense", "shake_128"])
def test_an_algorithm_that_cannot_be(tmp_path: Path, algorithm: str) -> None:
    path = build_chain(tmp_path, ["64k:A"]).active
    assert algorithm in run("hash", "--algorithm", algorithm, path).fails(2)


def test_a_hole_has_progress_too(tmp_path: Path) -> None:
    """One hole as long as the disk: a third of a second of zeroes, and more than its two ends."""
    path = tmp_path / "empty.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "512M")
    result = command("hash", "--progress", "json", path)
    done = [event["done"] for event in map(json.loads, result.err.splitlines())]
    assert done == sorted(done) and done[-1] == 512 << 20
    assert any(0 < each < 512 << 20 for each in done)
