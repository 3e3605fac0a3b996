"""`qchain chain`, judged by hand-made chains and by qemu-img."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import command, on_terminal, run

from fixtures.build import build_chain
from fixtures.oracle import qemu_img, qemu_info, qemu_map

K = 1 << 10
LAYERS = ["256k:A 256k:- 512k:B", "128k:- 256k:C 64k:0 576k:-", "[cluster=4k] 64k:D 4k:E 956k:-"]


@pytest.mark.parametrize("base", ["", "[raw] "])
def test_who_owns_what(tmp_path: Path, base: str) -> None:
    chain = build_chain(tmp_path, [base + LAYERS[0], *LAYERS[1:]])
    found = run("chain", "--json", chain.active).json
    assert found["virtual_size"] == 1 << 20
    layers = found["layers"]
    assert [layer["path"] for layer in layers] == [str(path) for path in chain.paths[::-1]]
    assert [layer["allocated_bytes"] for layer in layers] == [68 * K, 320 * K, 768 * K]
    # C covers 128 KiB of A, D and E 68 KiB more of it; no other layer is hidden.
    assert [layer["owned_bytes"] for layer in layers] == [68 * K, 320 * K, (768 - 68 - 128) * K]
    for layer, path, fmt in zip(layers, chain.paths[::-1], chain.formats[::-1], strict=True):
        judge = qemu_info(path, fmt)
        assert layer["owned_bytes"] + layer["shadowed_bytes"] == layer["allocated_bytes"]
        assert layer["format"] == fmt
        assert layer["virtual_size"] == judge["virtual-size"]
        assert layer["disk_size"] == judge["actual-size"]
        assert layer["file_size"] == path.stat().st_size
        assert layer["cluster_size"] == (judge["cluster-size"] if fmt == "qcow2" else None)
    assert layers[0]["backing"] == {"name": chain.paths[1].name, "format": "qcow2"}
    assert layers[-1]["backing"] is None


def test_owned_bytes_are_those_of_qemu_img_map(tmp_path: Path) -> None:
    layers = ["64k:A 320k:- 64k:B", "[ext cluster=16k zstd] 30k:C 34k:- 16k:d 8k:0 360k:-"]
    chain = build_chain(tmp_path, [*layers, "[cluster=2M] 448k:-", "[size=300k] 4k:-"])
    owned = [0] * 4
    for extent in qemu_map(chain.active):
        if extent["present"]:
            owned[extent["depth"]] += extent["length"]
    found = run("chain", "--json", chain.active).json
    assert [layer["owned_bytes"] for layer in found["layers"]] == owned


def test_drawing(tmp_path: Path) -> None:
    """One column is a sixtieth of the disk: the rows show exactly what was written."""
    chain = build_chain(tmp_path, ["960k:A", "[cluster=4k] 480k:- 160k:B 4k:C 316k:-"])
    result = command("chain", chain.active, PYTHONIOENCODING="utf-8")
    rows = [line[5:65] for line in result.out.splitlines()[-3:-1]]
    assert rows[0] == "·" * 30 + "█" * 10 + "░" + "·" * 19
    assert rows[1] == "█" * 30 + "·" * 10 + "▓" + "█" * 19
    plain = command("chain", chain.active, PYTHONIOENCODING="ascii").out
    assert "." * 30 + "#" * 10 + "-" in plain and plain.isascii()


def test_drawing_of_a_large_disk(tmp_path: Path) -> None:
    """Many windows of the reader to a column, and a shorter layer that hides the base."""
    chain = build_chain(tmp_path, ["[size=1200G] 64k:-", "[size=600G] 64k:-", "[size=1200G] 64k:A"])
    out = command("chain", chain.active, PYTHONIOENCODING="utf-8").out.splitlines()
    assert [line[5:65] for line in out[-4:-1]] == ["░" + "·" * 59, "·" * 60, "·" * 60]


def test_text_is_narrow_plain_and_harmless(tmp_path: Path) -> None:
    name = "[bold]evil\x1b[31m\nname " + "x" * 100 + ".qcow2"
    path = build_chain(tmp_path, ["64k:A", "64k:-"], ["base.qcow2", name]).active
    out = command("chain", path, FORCE_COLOR="1", COLUMNS="40").out
    assert "\x1b" not in out and name.replace("\x1b", "\\x1b").replace("\n", "\\n") in out
    out = on_terminal("chain", path).out
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out and "[bold" in out and "x.qcow2" in out


def test_a_disk_without_bytes(tmp_path: Path) -> None:
    path = tmp_path / "empty.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "0")
    assert run("chain", "--json", path).json["virtual_size"] == 0
    assert run("chain", path).code == 0
