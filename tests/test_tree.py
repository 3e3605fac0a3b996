"""`qchain tree`: who backs on whom, judged by how the images were made."""

from __future__ import annotations

import os
from pathlib import Path

from cli_runner import run

from fixtures.build import build_chain, build_tree
from fixtures.oracle import qemu_img

K = 1 << 10


def images_of(*arguments: str | Path) -> dict[str, dict[str, object]]:
    result = run("tree", "--json", *arguments)
    assert result.code == 0 and result.err == ""
    assert list(result.json) == ["images"]
    return {Path(entry["path"]).name: entry for entry in result.json["images"]}


def test_overlays_of_one_base(tmp_path: Path) -> None:
    layers = {
        "base": (None, "[raw] 1M:A"),
        "mid": ("base", "64k:B"),
        "one": ("mid", "64k:C"),
        "two": ("mid", "64k:D"),
        "lone": (None, "64k:E"),
    }
    tree = build_tree(tmp_path, layers)
    found = images_of(tmp_path)
    assert set(found) == {path.name for path in tree.paths.values()}
    for name, (parent, _) in layers.items():
        entry = found[tree.paths[name].name]
        assert entry["path"] == str(tree.paths[name])
        assert entry["format"] == tree.specs[name].format
        assert entry["virtual_size"] == tree.sizes[name]
        assert entry["backing"] == (None if parent is None else str(tree.paths[parent]))
        above = sorted(str(tree.paths[n]) for n, (p, _) in layers.items() if p == name)
        assert sorted(entry["overlays"]) == above  # type: ignore[call-overload]
        assert entry["problems"] == [] and entry["warnings"] == []


def test_the_picture(tmp_path: Path) -> None:
    build_tree(
        tmp_path,
        {
            "base": (None, "1M:A"),
            "mid": ("base", "64k:B"),
            "x": ("mid", "64k:C"),
            "y": ("base", "64k:D"),
            "z": (None, "64k:E"),
        },
    )
    lines = [line.partition("  (")[0] for line in run("tree", tmp_path).out.splitlines()]
    assert [line.replace(f"{tmp_path}/", "").replace(".qcow2", "") for line in lines] == [
        "base",
        "|-- mid",
        "|   `-- x",
        "`-- y",
        "z",
    ]


def test_a_link_does_not_hide_the_file(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["64k:A", "64k:B"])
    (tmp_path / "a-link").symlink_to(built.active.name)
    assert set(images_of(tmp_path)) == {path.name for path in built.paths}


def test_missing_looping_and_unrecorded(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["64k:A", "64k:B", "64k:C"])
    built.base.unlink()
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "r1.qcow2", "1M")
    for name, backing in (("r2", "r1"), ("r1", "r2")):
        path = tmp_path / f"{name}.qcow2"
        if not path.exists():
            qemu_img("create", "-q", "-f", "qcow2", path, "1M")
        qemu_img("rebase", "-u", "-F", "qcow2", "-b", f"{backing}.qcow2", path)
    found = images_of(tmp_path)
    assert any("missing" in text for text in found["l1.qcow2"]["problems"])  # type: ignore[attr-defined]
    assert found["l2.qcow2"]["problems"] == []
    loops = [text for n in ("r1", "r2") for text in found[f"{n}.qcow2"]["problems"]]  # type: ignore[attr-defined]
    assert any("loop" in text for text in loops)
    text = run("tree", tmp_path).out
    # What leads nowhere is drawn all the same, each image once.
    for name in found:
        assert sum(f"/{name}  (" in line for line in text.splitlines()) == 1
    assert "! its backing file" in text


def test_the_image_that_closes_a_loop(tmp_path: Path) -> None:
    """As `qchain chain` says it of the active image, whatever the order of the names."""
    for name in ("a", "b", "top"):
        qemu_img("create", "-q", "-f", "qcow2", tmp_path / name, "1M")
    for name, backing in (("top", "b"), ("b", "a"), ("a", "b")):
        qemu_img("rebase", "-u", "-F", "qcow2", "-b", backing, tmp_path / name)
    problems = {name: entry["problems"] for name, entry in images_of(tmp_path).items()}
    why = f"the chain loops: it backs on {tmp_path}/b, which backs on it"
    assert problems == {"a": [why], "b": [], "top": []}
    assert run("chain", tmp_path / "top").fails(4).startswith(f"qchain: {tmp_path}/a: ")


def test_a_base_changed_later_is_a_warning(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["64k:A", "64k:B", "64k:C"])
    assert "?" not in run("tree", tmp_path).out
    later = built.paths[1].stat().st_mtime + 3600
    os.utime(built.base, (later, later))
    found = images_of(tmp_path)
    assert [bool(found[path.name]["warnings"]) for path in built.paths] == [False, True, False]
    assert "? its backing file base.qcow2 was written at" in run("tree", tmp_path).out


def test_deep_chains_are_drawn(tmp_path: Path) -> None:
    below = None
    for index in range(400):
        path = tmp_path / f"i{index:03}.qcow2"
        # Only headers matter: a copy with another backing name is an overlay.
        if below is None:
            qemu_img("create", "-q", "-f", "qcow2", path, "1M")
            base = path
            first = tmp_path / "first"
            qemu_img(
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                path.name,
                "-F",
                "qcow2",
                first.with_name("t.qcow2"),
                "1M",
            )
            template = first.with_name("t.qcow2").read_bytes()
            first.with_name("t.qcow2").unlink()
        else:
            path.write_bytes(template.replace(base.name.encode(), below.name.encode()))
        below = path
    result = run("tree", tmp_path)
    assert result.code == 0 and len(result.out.splitlines()) == 400


def test_no_directory(tmp_path: Path) -> None:
    run("tree", tmp_path / "none").fails(4)
    assert run("tree", tmp_path).out == "no images\n"
    assert run("tree", "--json", tmp_path).json == {"images": []}


def test_hostile_names_stay_on_their_line(tmp_path: Path) -> None:
    build_chain(tmp_path, ["64k:A", "64k:B"], names=["a\x1b[2J\nb.qcow2", "c\u202ed.qcow2"])
    out = run("tree", tmp_path).out
    assert len(out.splitlines()) == 2 and all(line.isprintable() for line in out.splitlines())


def test_a_size_that_nothing_tells_is_not_shown(tmp_path: Path) -> None:
    """A backing file of no recorded format, or outside of what is looked through: not opened."""
    (tmp_path / "raw").write_bytes(bytes(64 * K))
    outside = build_chain(tmp_path / "outside", ["64k:A"]).active
    where = tmp_path / "here"
    where.mkdir()
    path = where / "a.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "../raw", "-F", "raw", path, "64k")
    # The extension with the format becomes an unknown one.
    path.write_bytes(path.read_bytes().replace(bytes.fromhex("e2792aca"), b"\x01\x02\x03\x04"))
    qemu_img("create", "-q", "-f", "qcow2", "-b", outside, "-F", "qcow2", where / "b.qcow2")
    found = images_of(where)
    assert found["raw"]["virtual_size"] is None and found["raw"]["format"] == "unknown"
    assert found[outside.name]["virtual_size"] is None
    text = run("tree", where).out
    assert " 0 B," not in text and "/raw  (format not recorded, " in text
    assert f"{outside}  (qcow2, " in text and "b.qcow2  (qcow2, 64.0 KiB, " in text
