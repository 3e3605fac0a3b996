"""Files that were cut short: qemu reads zeroes beyond their end; whatever shows it says so.

The judge is qemu: `qemu-img map` tells where data lies, `convert` what is read, `check` that it
finds no more corruptions and leaks than we do.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from cli_runner import Result, run

from fixtures.build import build_chain
from fixtures.oracle import qemu_check, qemu_img, qemu_map, raw_of
from fixtures.shapes import build_singles

K = 1 << 10
LAYERS = {
    "plain": "256k:A 64k:- 128k:B",
    "unaligned": "[size=383k] 256k:A 64k:- 63k:B",
    "extended": "[ext cluster=64k] 64k:A 64k:- 4k:B 60k:- 2k:C 62k:-",
    "small": "[cluster=512] 4k:A 4k:- 4k:B",
    "zero": "256k:A 128k:B 64k:0",
}


def lacks(path: Path) -> bool:
    """Whether data of this image lies beyond the end of the file, by qemu's map."""
    size = path.stat().st_size
    return any(
        extent["data"] and extent.get("offset", 0) + extent["length"] > size
        for extent in qemu_map(path)
    )


def cuts(path: Path) -> list[int]:
    """Sizes to cut the file to: none, within and between the pieces of data."""
    size, places = path.stat().st_size, set()
    for extent in qemu_map(path):
        if extent["data"]:
            end = extent["offset"] + extent["length"]
            places |= {end, end - 1, end - 512, extent["offset"], extent["offset"] + 700}
    return sorted({size, *(place for place in places if place <= size)}, reverse=True)


def warned(result: Result, path: Path) -> bool:
    """Whether it says so, in one line; nothing else is said."""
    assert result.code in (0, 1), result.err
    lines = [line for line in result.err.splitlines() if "beyond the end of the file" in line]
    assert len(lines) <= 1 and result.err.splitlines() == lines
    assert all(line.startswith(f"qchain: {path}: ") for line in lines)
    return bool(lines)


@pytest.mark.parametrize("name", LAYERS)
def test_every_command_says_it_when_it_is_so(tmp_path: Path, name: str) -> None:
    whole = build_chain(tmp_path / "whole", [LAYERS[name]]).active
    content = raw_of(whole)
    path, out = tmp_path / "cut.qcow2", tmp_path / "out"
    seen = set()
    for size in cuts(whole):
        path.write_bytes(whole.read_bytes())
        os.truncate(path, size)
        expected, raw = lacks(path), raw_of(path)
        seen.add(expected)
        result = run("hash", "--json", path)
        assert warned(result, path) == expected, size
        assert result.json["digest"] == hashlib.sha256(raw).hexdigest()
        assert warned(run("map", path), path) == expected
        assert warned(run("map", "--json", path), path) == expected
        assert warned(run("extract", path, "-o", out), path) == expected
        assert out.read_bytes() == raw
        out.unlink()
        result = run("compare", "--json", path, whole)
        assert warned(result, path) == expected
        assert result.json["identical"] == (raw == content)
        result = run("info", "--json", path)
        assert result.code == 0 and result.json["readable"] is True
        assert [("beyond" in text) for text in result.json["problems"]] == [True] * expected
        result, judge = run("check", "--json", path), qemu_check(path)
        assert result.json["leaks"] == judge["leaks"]
        assert (result.json["corruptions"] > 0) == (judge["corruptions"] > 0)
        assert result.code == int(expected or any(judge.values()))
    assert seen == {True, False}


def test_the_layer_that_is_cut_is_named(tmp_path: Path) -> None:
    chain = build_chain(tmp_path, ["256k:A", "64k:B 192k:-"])
    whole = tmp_path / "whole.qcow2"
    whole.write_bytes(chain.base.read_bytes())
    os.truncate(chain.base, chain.base.stat().st_size - 64 * K)
    for words in (("hash",), ("map",), ("chain",), ("compare", whole), ("diff", whole)):
        assert warned(run(*words, chain.active), chain.base), words
    (warning,) = run("chain", "--json", chain.active).json["warnings"]
    assert str(chain.base) in warning
    # The overlay hides what is missing: nobody reads it.
    chain = build_chain(tmp_path / "hidden", ["256k:A", "192k:- 64k:B"])
    os.truncate(chain.base, chain.base.stat().st_size - 64 * K)
    for words in (("hash",), ("map",)):
        assert not warned(run(*words, chain.active), chain.base), words


def test_whole_images_are_not_suspected(tmp_path: Path) -> None:
    """Of every shape that qemu makes, preallocated and written to in the last sector too."""
    images = build_singles(tmp_path / "shapes")
    for how in ("metadata", "falloc", "full", "off"):
        path = tmp_path / how
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"preallocation={how}", path, "1000000")
        images[how] = path.read_bytes()
    path = tmp_path / "image"
    for name, raw in images.items():
        path.write_bytes(raw)
        assert not any("beyond" in text for text in run("info", "--json", path).json["problems"])
        for words in (("chain",), ("map", "--layer")):
            result = run(*words, path, "--follow")
            assert "beyond the end" not in result.err, (name, words)
