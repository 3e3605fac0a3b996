"""`qchain diff`: ranges, layers and files, judged by the shadow model and by what was done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from cli_runner import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.build import build_chain, build_tree
from fixtures.generate import chains
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_img, run_tool
from fixtures.shadow import shadow_points

K = 1 << 10
M = 1 << 20


def sectors_that_differ(a: bytes, b: bytes) -> set[int]:
    size = max(len(a), len(b))
    a, b = a.ljust(size, b"\0"), b.ljust(size, b"\0")
    return {at for at in range(0, size, 512) if a[at : at + 512] != b[at : at + 512]}


def sectors_of(ranges: list[dict[str, int]]) -> set[int]:
    out: set[int] = set()
    position = -1
    for entry in ranges:
        assert entry["start"] > position and entry["length"] > 0
        position = entry["start"] + entry["length"] - 1
        out |= set(range(entry["start"], entry["start"] + entry["length"], 512))
    return out


def test_ranges_and_their_layers(tmp_path: Path) -> None:
    tree = build_tree(
        tmp_path,
        {
            "base": (None, "256k:A"),
            "a": ("base", "64k:- 64k:B"),
            "b": ("base", "64k:- 32k:C 96k:-"),
        },
    )
    a, b, base = (tree.paths[name] for name in ("a", "b", "base"))
    result = run("diff", "--json", a, b)
    assert result.code == 1 and result.err == ""
    # b's cluster of 64k is b's as a whole: the second half was copied up.
    assert result.json == {
        "identical": False,
        "ranges": [
            {"start": 64 * K, "length": 64 * K, "a_layer": str(a), "b_layer": str(b)},
        ],
    }
    result = run("diff", "--json", base, a)
    assert [entry["a_layer"] for entry in result.json["ranges"]] == [str(base)]
    text = run("diff", a, b)
    assert text.code == 1 and text.out.splitlines()[1].split() == [
        *(str(64 * K), str(64 * K)),
        *("a.qcow2", "->", "b.qcow2"),
    ]


def test_cut_where_the_owner_changes_and_past_the_end(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["128k:A", "[size=256k] 64k:- 128k:B 64k:-"])
    result = run("diff", "--json", built.base, built.active)
    assert [tuple(entry.values()) for entry in result.json["ranges"]] == [
        (64 * K, 64 * K, str(built.base), str(built.active)),
        (128 * K, 64 * K, None, str(built.active)),
    ]


def test_identical(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["128k:A", "64k:A"])
    result = run("diff", "--json", *built.paths)
    assert result.code == 0 and result.json == {"identical": True, "ranges": []}
    assert run("diff", "--files", *built.paths).out == "identical\n"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(chains(max_layers=3), st.data())
def test_random_chains_against_the_shadow_model(
    specs: list[LayerSpec], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        built = build_chain(Path(scratch), specs)
        points = shadow_points(built.specs)
        pick = st.integers(0, len(points) - 1)
        i, j = data.draw(pick), data.draw(pick)
        result = run(
            "diff", "--json", "-f", built.formats[i], "-F", built.formats[j],
            built.paths[i], built.paths[j],
        )  # fmt: skip
        expected = sectors_that_differ(points[i], points[j])
        assert sectors_of(result.json["ranges"]) == expected
        assert result.code == (1 if expected else 0)
        assert result.json["identical"] == (not expected)


# The files of a filesystem


def make_ext(directory: Path, kind: str, options: tuple[str, ...] = ()) -> Path:
    """A raw ext filesystem of 16 MiB with a few files."""
    tree = directory / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "passwd").write_text("root\n" * 400)
    (tree / "etc" / "kept").write_bytes(os.urandom(9000))
    (tree / "secret").write_bytes(os.urandom(70_000))
    (tree / "gone").write_text("gone")
    (tree / "new\nline").write_text("name with a line feed")
    (tree / "link").symlink_to("secret")
    # debugfs prints targets as they are: these look like lines of its own.
    (tree / "forged").symlink_to('x"\nEXTENTS:\n(0-9):1-9\ndebugfs: stat <12>\nInode: 12')
    raw = directory / "fs.raw"
    run_tool(["mke2fs", "-q", "-F", "-t", kind, *options, "-d", tree, raw, "16M"])
    return raw


def tamper(raw: Path, offset: int = 0) -> None:
    """Add, remove, change; one file is changed in place with all its times kept."""
    content = raw.read_bytes()
    where = f"{raw}?offset={offset}" if offset else str(raw)
    extra = raw.with_name("extra")
    extra.write_text("added")
    for command in ("rm gone", f"write {extra} etc/added", "sif etc/kept mode 0100600"):
        run_tool(["debugfs", "-w", "-R", command, where])
    blocks = run_tool(["debugfs", "-R", "blocks secret", where]).stdout.split()
    size = int.from_bytes(content[offset + 1048 : offset + 1052], "little")
    with raw.open("r+b") as stream:
        stream.seek(offset + int(blocks[0]) * (1024 << size) + 100)
        stream.write(b"TAMPERED")


EXPECTED = {
    ("/etc/added", "added"),
    ("/gone", "removed"),
    ("/etc/kept", "metadata"),
    ("/secret", "content"),
}


def changes_of(report: dict[str, object]) -> set[tuple[str, str]]:
    found = {(entry["path"], entry["change"]) for entry in report["changes"]}  # type: ignore[attr-defined]
    # Directories change with what is in them, as far as debugfs keeps their times.
    return {each for each in found if each not in {("/", "metadata"), ("/etc", "metadata")}}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("ext2", ()), ("ext4", ()), ("ext4", ("-b", "4096")), ("ext4", ("-O", "inline_data"))],
)
def test_changed_files_of_a_filesystem(tmp_path: Path, kind: str, options: tuple[str, ...]) -> None:
    raw = make_ext(tmp_path, kind, options)
    image = tmp_path / "a.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    tamper(raw)
    result = run("diff", "--json", "--files", "-F", "raw", image, raw)
    assert result.code == 1 and result.err == ""
    report = result.json["files"]
    assert report["reason"] is None and not report["table_changed"]
    assert changes_of(report) == EXPECTED
    by_path = {entry["path"]: entry for entry in report["changes"]}
    assert by_path["/secret"]["fields"] == []  # no time gives it away
    assert "mode" in by_path["/etc/kept"]["fields"]
    text = run("diff", "--files", "-F", "raw", image, raw)
    assert "content   /secret" in text.out


def test_changed_files_of_a_partition(tmp_path: Path) -> None:
    fs = make_ext(tmp_path, "ext4")
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as stream:
        stream.truncate(40 * M)
        stream.seek(20 * M)
        stream.write(fs.read_bytes())
    table = "label: gpt\nstart=2048,size=8192\nstart=40960,size=32768\n"
    subprocess.run(["sfdisk", "-q", disk], input=table, text=True, check=True, capture_output=True)
    image = tmp_path / "a.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, image)
    tamper(disk, 20 * M)
    result = run("diff", "--json", "--files", "-F", "raw", image, disk)
    report = result.json["files"]
    assert report["reason"] is None
    assert changes_of(report) == EXPECTED
    assert {entry["partition"] for entry in report["changes"]} == {2}
    parts = [(entry["number"], entry["changed"]) for entry in report["partitions"]]
    assert parts == [(1, False), (2, True)]


def test_content_that_moved_is_not_changed(tmp_path: Path) -> None:
    """The same files laid out anew: the ranges differ, the contents do not."""
    raw = make_ext(tmp_path, "ext4")
    other = tmp_path / "other.raw"
    run_tool(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-g", "4096", "-d", tmp_path / "tree", other, "16M"]
    )
    result = run("diff", "--json", "--files", "-f", "raw", "-F", "raw", raw, other)
    assert result.code == 1
    changes = result.json["files"]["changes"]
    assert not {entry["path"] for entry in changes if entry["change"] != "metadata"}


@pytest.mark.parametrize(
    ("at", "magic", "word"), [(0, b"XFSB", "XFS"), (3, b"NTFS    ", "NTFS"), (0, b"", "known")]
)
def test_says_why_files_cannot_be_named(tmp_path: Path, at: int, magic: bytes, word: str) -> None:
    a, b = tmp_path / "a.raw", tmp_path / "b.raw"
    a.write_bytes((bytes(at) + magic).ljust(2 * M, b"\0"))
    b.write_bytes((bytes(at) + magic).ljust(2 * M, b"\1"))
    result = run("diff", "--json", "--files", "-f", "raw", "-F", "raw", a, b)
    line = result.fails(1)
    assert "the files cannot be named" in line and word in line
    assert word in json.loads(result.out)["files"]["reason"]


def test_a_damaged_filesystem_is_no_traceback(tmp_path: Path) -> None:
    raw = make_ext(tmp_path, "ext4")
    good = tmp_path / "good.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, good)
    content = bytearray(raw.read_bytes())
    for at in range(2048, M, 997):
        content[at] ^= 0xFF
    raw.write_bytes(content)
    result = run("diff", "--json", "--files", "-F", "raw", good, raw)
    assert result.code == 1 and "internal error" not in result.err
    report = json.loads(result.out)["files"]
    assert report["reason"] or report["notes"] or report["changes"]


def test_nothing_stays_in_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_ext(tmp_path, "ext4")
    image = tmp_path / "a.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    tamper(raw)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert run("diff", "--files", "-F", "raw", image, raw).code == 1
    assert list(scratch.iterdir()) == []


def disk_of(directory: Path, label: str, parts: list[tuple[Path, str]]) -> tuple[Path, list[int]]:
    """A raw disk with one partition for each file, of the type given; where they begin."""
    disk = directory / "disk.raw"
    starts, lines, at = [], [], M
    for path, kind in parts:
        size = -(-path.stat().st_size // M) * M
        starts.append(at)
        lines.append(f"start={at // 512}, size={size // 512}, type={kind}\n")
        at += size
    with disk.open("wb") as stream:
        stream.truncate(at + M)
    for (path, _), start in zip(parts, starts, strict=True):
        words = [f"if={path}", f"of={disk}", "bs=1M", "conv=notrunc,sparse"]
        run_tool(["dd", *words, f"seek={start // M}"])
    program = shutil.which("sfdisk", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert program is not None
    table = f"label: {label}\n{''.join(lines)}"
    subprocess.run([program, "-q", disk], input=table, text=True, check=True, capture_output=True)
    return disk, starts


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as stream:
        stream.truncate(size)
    return path


def make(words: list[str], path: Path) -> None:
    run_tool(["env", f"PATH={os.environ['PATH']}:/usr/sbin:/sbin", *words, path])


def test_a_disk_of_real_filesystems(tmp_path: Path) -> None:
    """Each made by its own maker: files are named in ext, for the others it is said why not."""
    ext = make_ext(tmp_path, "ext4")
    makers = {
        "XFS": (["mkfs.xfs", "-q"], 300 * M),
        "NTFS": (["mkfs.ntfs", "-q", "-F", "-s", "512", "-H", "1", "-S", "1", "-p", "0"], 4 * M),
        "FAT": (["mkfs.vfat"], 4 * M),
        "Btrfs": (["mkfs.btrfs", "-q"], 128 * M),
        "swap": (["mkswap"], 2 * M),
    }
    parts = [(ext, "linux")]
    for name, (words, size) in makers.items():
        parts.append((sparse(tmp_path / name, size), "linux"))
        make(words, parts[-1][0])
    luks = tmp_path / "luks"
    secret = ["--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"]
    qemu_img("create", "-q", "-f", "luks", *secret, luks, "1M")
    # The first sectors of a physical volume, as the LVM manual has them.
    volume = sparse(tmp_path / "volume", 2 * M)
    volume.write_bytes(bytes(512) + b"LABELONE" + bytes(16) + b"LVM2 001" + bytes(2 * M - 544))
    parts += [(luks, "linux"), (volume, "lvm")]
    disk, starts = disk_of(tmp_path, "gpt", parts)

    image = tmp_path / "a.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, image)
    tamper(disk, starts[0])
    with disk.open("r+b") as stream:  # one byte in every other partition
        for start in starts[1:]:
            stream.seek(start + 200_000)
            byte = stream.read(1)[0]
            stream.seek(start + 200_000)
            stream.write(bytes([byte ^ 1]))
    result = run("diff", "--json", "--files", "-F", "raw", image, disk)
    report = result.json["files"]
    assert result.code == 1 and report["reason"] is None and not report["table_changed"]
    assert changes_of(report) == EXPECTED
    words = ("ext", *makers, "LUKS", "LVM")
    assert [each["number"] for each in report["partitions"]] == list(range(1, len(words) + 1))
    for part, word in zip(report["partitions"], words, strict=True):
        assert part["changed"] and word in part["filesystem"], part
        if word == "ext":
            assert part["reason"] is None
        else:
            assert word in part["reason"] and "only ext2, ext3 and ext4" in part["reason"]
    text = run("diff", "--files", "-F", "raw", image, disk).out
    assert "partition 1 (ext, 16.0 MiB): changed" in text
    assert "partition 2 (XFS, 300 MiB): files not named: it holds XFS" in text
    assert "content   1:/secret  (and no time of change)" in text


@pytest.mark.parametrize("label", ["gpt", "dos"])
def test_a_partition_that_was_added(tmp_path: Path, label: str) -> None:
    ext = make_ext(tmp_path, "ext3", ("-J", "size=1"))
    (tmp_path / "one").mkdir()
    first, starts = disk_of(tmp_path / "one", label, [(ext, "linux")])
    both = [(ext, "linux"), (sparse(tmp_path / "empty", 2 * M), "linux")]
    second, _ = disk_of(tmp_path, label, both)
    tamper(second, starts[0])
    result = run("diff", "--json", "--files", "-f", "raw", "-F", "raw", first, second)
    report = result.json["files"]
    assert report["table_changed"] and changes_of(report) == EXPECTED
    assert [each["number"] for each in report["partitions"]] == [1, 2]
    assert "exists only in B" in report["partitions"][1]["reason"]
    text = run("diff", "--files", "-f", "raw", "-F", "raw", first, second).out
    assert "the partition table is not the same" in text


def test_logical_partitions(tmp_path: Path) -> None:
    """The extended partition that holds them is none that could be named or not."""
    fs = make_ext(tmp_path, "ext4")
    disk = sparse(tmp_path / "disk.raw", 64 * M)
    table = "label: dos\nstart=2048,size=8192\nstart=16384,type=5\nstart=20480,size=32768\n"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    words = ["env", f"PATH={path}", "sfdisk", "-q", disk]
    subprocess.run(words, input=table, text=True, check=True, capture_output=True)
    run_tool(["dd", f"if={fs}", f"of={disk}", "bs=1M", "seek=10", "conv=notrunc"])
    image = tmp_path / "a.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, image)
    tamper(disk, 10 * M)
    report = run("diff", "--json", "--files", "-F", "raw", image, disk).json["files"]
    assert report["reason"] is None and changes_of(report) == EXPECTED
    assert {entry["partition"] for entry in report["changes"]} == {5}
    assert [(each["number"], each["changed"]) for each in report["partitions"]] == [
        (1, False),
        (5, True),
    ]


def test_hostile_names_of_files(tmp_path: Path) -> None:
    """Names in the guest's filesystem are data from outside too."""
    raw = make_ext(tmp_path, "ext4")
    image = tmp_path / "a.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    names = ("\x1b]0;owned\x07\x1b[2J", "line\nadded     forged", "\u202egnp.exe", "\udcff\udcfe")
    tree = tmp_path / "tree"
    for name in names:
        (tree / name).write_text("hostile")
    other = tmp_path / "other.raw"
    run_tool(["mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, other, "16M"])
    result = run("diff", "--json", "--files", "-F", "raw", image, other)
    added = {each["path"] for each in result.json["files"]["changes"] if each["change"] == "added"}
    assert added == {f"/{name}" for name in names}
    assert result.out.isascii()
    text = run("diff", "--files", "-F", "raw", image, other).out
    assert all(line.isprintable() for line in text.splitlines()) and "\\x1b[2J" in text
    assert not any(line.startswith("added     forged") for line in text.splitlines())
