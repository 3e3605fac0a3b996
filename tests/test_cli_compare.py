"""`qchain compare`, judged by qemu-img and by what was written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cli_runner import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.build import build_chain, build_tree
from fixtures.generate import chains
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_compare, qemu_img
from fixtures.shadow import shadow_points

K = 1 << 10


def test_identical_overlays_of_one_base(tmp_path: Path) -> None:
    tree = build_tree(
        tmp_path,
        {"base": (None, "1M:A"), "a": ("base", "64k:B 64k:-"), "b": ("base", "64k:B 64k:-")},
    )
    result = run("compare", "--json", tree.paths["a"], tree.paths["b"])
    assert result.code == 0
    assert result.json == {
        "identical": True,
        "first_difference": None,
        "different_bytes": 0,
        "compared_bytes": 64 * K,
        "skipped_bytes": 960 * K,
    }
    assert run("compare", tree.paths["a"], tree.paths["b"]).out.startswith("identical")


def test_where_they_differ(tmp_path: Path) -> None:
    a = build_chain(tmp_path / "a", ["64k:A 64k:B 64k:A 64k:A"]).active
    b = build_chain(tmp_path / "b", ["[raw] 64k:A 64k:C 64k:A 1k:A 512:D 62k:A 512:A"]).active
    result = run("compare", "--json", "--list", a, b)
    assert result.code == 1 and result.err == ""
    assert result.json["ranges"] == [
        {"start": 64 * K, "length": 64 * K},
        {"start": 193 * K, "length": 512},
    ]
    left, right = shadow_points(["64k:B"])[0], shadow_points(["64k:C"])[0]
    changed = sum(x != y for x, y in zip(left, right, strict=True))
    # In each sector only the letter differs, once in 16 bytes.
    assert changed == 4 * K
    assert result.json["different_bytes"] == changed + 32
    assert result.json["first_difference"] == 64 * K
    text = run("compare", "--list", a, b)
    assert text.code == 1 and text.out.splitlines()[-1].split() == [str(193 * K), "512"]
    assert "ranges" not in run("compare", "--json", a, b).json


def test_a_longer_one_must_be_zero_beyond(tmp_path: Path) -> None:
    a = build_chain(tmp_path / "a", ["64k:A"]).active
    b = build_chain(tmp_path / "b", ["64k:A 64k:- 64k:."]).active
    c = build_chain(tmp_path / "c", ["64k:A 64k:- 64k:D"]).active
    assert run("compare", a, b).code == run("compare", b, a).code == 0
    result = run("compare", "--json", a, c)
    assert (result.code, result.json["first_difference"]) == (1, 128 * K)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    a=chains(min_layers=1, max_layers=3), b=chains(min_layers=1, max_layers=2), same=st.booleans()
)
def test_agrees_with_qemu_img(a: list[LayerSpec], b: list[LayerSpec], same: bool) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        left = build_chain(Path(temporary) / "a", a)
        if same:
            right = Path(temporary) / "b.raw"
            fmt = "raw"
            qemu_img("convert", "-f", left.formats[-1], "-O", "raw", left.active, right)
        else:
            other = build_chain(Path(temporary) / "b", b)
            right, fmt = other.active, other.formats[-1]
        result = run(*("compare", "--json", "-f", left.formats[-1], "-F", fmt, left.active, right))
        judge = qemu_compare(left.active, right, left.formats[-1], fmt)
        assert result.code == (0 if judge else 1)
        assert result.json["identical"] is judge
        if not judge:
            x = shadow_points(a)[-1]
            y = x if same else shadow_points(b)[-1]
            size = max(len(x), len(y))
            x, y = x.ljust(size, b"\0"), y.ljust(size, b"\0")
            first = next(i for i, (p, q) in enumerate(zip(x, y, strict=True)) if p != q)
            assert result.json["first_difference"] == first
            assert result.json["different_bytes"] == sum(p != q for p, q in zip(x, y, strict=True))


def test_each_side_has_its_own_directory(tmp_path: Path) -> None:
    a = build_chain(tmp_path / "a", ["64k:A", "64k:-"]).active
    b = build_chain(tmp_path / "b", ["64k:A", "64k:-"]).active
    assert run("compare", a, b).code == 0


def test_a_missing_side_is_no_difference(tmp_path: Path) -> None:
    a = build_chain(tmp_path, ["64k:A"]).active
    result = run("compare", "--json", a, tmp_path / "none")
    assert "none" in result.fails(4) and result.out == ""
