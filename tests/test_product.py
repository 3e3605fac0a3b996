"""Images of qemu-img in all combinations of its options, read as qemu-img reads them.

Any three values of options that can meet do so in one of the few hundred images that are made by
default. `QCHAIN_PRODUCT=all` in the environment (`make product`) makes all of the thousands.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli_runner import run
from test_cli_map import as_qemu, mapped
from test_luks import create, opts, ours, qio, secret_object
from test_luks import judged as decrypted

from fixtures.oracle import QemuError, qemu_check, qemu_img, qemu_info, qemu_map, raw_of
from fixtures.product import (
    OPTIONS,
    Combination,
    build,
    covering,
    every,
    options,
    possible,
    size_of,
    writes,
)

PARTS = 8
CHOSEN = list(every()) if os.environ.get("QCHAIN_PRODUCT") == "all" else covering(3)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_combination(part: int, tmp_path: Path) -> None:
    wrong = []
    for number, one in enumerate(CHOSEN[part::PARTS]):
        directory = tmp_path / str(number)
        directory.mkdir()
        image = build(directory, one)
        found = differences(image, one)
        if found:
            wrong.append(f"{one}: {found}")
        else:
            for path in directory.iterdir():
                path.unlink()
    assert not wrong, "\n".join(wrong)


def differences(image: Path, one: Combination) -> dict[str, Any]:
    """What qchain says of the image, where that is not what qemu-img says: both."""
    raw = raw_of(image)
    assert any(raw), "nothing was written"
    told, found = qemu_info(image), run("info", "--json", image).json
    special = told["format-specific"]["data"]
    pairs: dict[str, tuple[Any, Any]] = {
        "digest": (run("hash", "--json", image).json["digest"], hashlib.sha256(raw).hexdigest()),
        "map": (mapped(image), as_qemu(qemu_map(image))),
        "check": (checked(image), qemu_check(image)),
        "readable": ((found["readable"], found["problems"]), (True, [])),
        "virtual size": (found["virtual_size"], told["virtual-size"]),
        "cluster size": (found["cluster_size"], told["cluster-size"]),
        "version": (found["version"], {"0.10": 2, "1.1": 3}[special["compat"]]),
        "refcount bits": (found["refcount_bits"], special["refcount-bits"]),
        "compression": (found["compression"], special["compression-type"]),
        "extended L2": (found["extended_l2"], special.get("extended-l2", False)),
        "lazy": (
            "lazy refcounts" in found["features"]["compatible"],
            special.get("lazy-refcounts", False),
        ),
        "data file": (found["data_file"], special.get("data-file")),
        "raw data file": (
            "raw external data" in found["features"]["autoclear"],
            special.get("data-file-raw", False),
        ),
        "backing": (
            found["backing"] and (found["backing"]["name"], found["backing"]["format"]),
            None
            if one["backing"] == "none"
            else (told["backing-filename"], told["backing-filename-format"]),
        ),
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


ENCRYPTED = [one | {"backing": "none"} for one in covering(1)]


@pytest.mark.parametrize("part", range(4))
def test_with_encryption(part: int, tmp_path: Path) -> None:
    """Each value of each option with LUKS (qemu-img takes two seconds to make a key)."""
    for number, one in enumerate(ENCRYPTED[part::4]):
        image = tmp_path / str(number) / "image.qcow2"
        image.parent.mkdir()
        assert possible(one)
        create(image, "," + options(image.parent, one), str(size_of(one)))
        qio(image, *writes(one))
        expected = decrypted(image)
        assert any(expected) and ours(image) == expected, one
        secret = (*secret_object(image.parent), "--image-opts", opts(image))
        judge = json.loads(qemu_img("map", "--output=json", *secret).stdout)
        assert without_offset(mapped(image)) == without_offset(as_qemu(judge)), one
        report = json.loads(qemu_img("check", "--output=json", *secret, ok=(0, 2, 3)).stdout)
        assert checked(image) == {name: report.get(name, 0) for name in ("corruptions", "leaks")}
        found = run("info", "--json", image).json
        assert (found["encryption"], found["readable"], found["problems"]) == ("luks", True, [])
        assert found["luks"]["key_slots"][0]["slot"] == 0


def without_offset(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """qemu gives no place where data is encrypted; neighbours are joined anew."""
    return as_qemu([{k: v for k, v in each.items() if k != "offset"} for each in found])


def checked(image: Path) -> dict[str, int]:
    report = run("check", "--json", image).json
    assert report["suspicions"] == 0
    return {name: report[name] for name in ("corruptions", "leaks")}


def test_every_value_is_there() -> None:
    for name, values in OPTIONS.items():
        assert {one[name] for one in CHOSEN} == set(values)
        if name != "backing":
            assert {one[name] for one in ENCRYPTED} == set(values)
    assert len(CHOSEN) > 300


def test_what_is_left_out_qemu_img_refuses(tmp_path: Path) -> None:
    """What `possible` leaves out is not left out by mistake: one of each kind."""
    plain = next(iter(every())) | {"cluster_size": "65536"}
    assert possible(plain)
    for change in (
        {"compat": "0.10", "extended_l2": "on"},
        {"compat": "0.10", "lazy_refcounts": "on"},
        {"compat": "0.10", "refcount_bits": "8"},
        {"compat": "0.10", "compression_type": "zstd"},
        {"compat": "0.10", "data_file": "file"},
        {"extended_l2": "on", "cluster_size": "8192"},
        {"data_file": "raw", "backing": "raw"},
        {"backing": "raw", "preallocation": "metadata"},
        {"backing": "raw", "preallocation": "full"},
    ):
        one = plain | change
        assert not possible(one)
        if one["compat"] == "0.10":
            words = ",".join(f"{n}={v}" for n, v in change.items() if n != "data_file")
            words += f",data_file={tmp_path / 'd'}" if "data_file" in change else ""
            with pytest.raises(QemuError):
                qemu_img("create", "-q", "-f", "qcow2", "-o", words, tmp_path / "image", "1M")
        else:
            with pytest.raises(QemuError):
                build(tmp_path, one)
