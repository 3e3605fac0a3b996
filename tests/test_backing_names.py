"""Whatever way a backing file is named, the content is that which qemu-img reads.

Which names are let through, and how refusals read, is for test_gate.py; here the right
bytes have to come out. Every base holds another pattern than its decoys.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures.build import build_chain
from fixtures.oracle import QemuError, qemu_img, qemu_io, raw_of
from fixtures.shadow import pattern
from qchain.chain.chain import open_chain
from qchain.chain.gate import Gate
from qchain.chain.names import resolve_backing
from qchain.chain.reader import read
from qchain.errors import ImageError, NotAllowed, Unsupported

SIZE = 256 << 10


def base(path: Path, letter: str = "A", fmt: str = "qcow2") -> Path:
    """An image full of one letter's pattern."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = f"[{'raw ' if fmt == 'raw' else ''}size={SIZE >> 10}k] {SIZE >> 10}k:{letter}"
    return build_chain(
        path.parent, [line], [path.name if "." in path.name else f"{path.name}."]
    ).base


def over(path: Path, name: str, fmt: str = "qcow2") -> Path:
    """An overlay that records `name`, whatever is there, with one cluster of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    qemu_io(path, ["write -q -P 9 64k 64k"], "qcow2")
    qemu_img("rebase", "-u", "-b", name, "-F", fmt, path)
    return path


def content(letter: str) -> bytes:
    """What an overlay over a base of `letter` reads as."""
    whole = pattern(letter, 0, SIZE)
    return whole[: 64 << 10] + b"\t" * (64 << 10) + whole[128 << 10 :]


def ours(image: Path, gate: Gate | None = None) -> bytes:
    with open_chain(image, gate) as chain:
        return read(chain.layers, 0, chain.size)


def assert_reads(image: Path, letter: str, gate: Gate | None = None) -> None:
    expected = raw_of(image)
    assert expected == content(letter)
    assert ours(image, gate) == expected


# --- plain, file: and json: ------------------------------------------------------------------

NAMES = {
    "relative": "base.img",
    "relative, dotted": "./base.img",
    "relative, up and down": "sub/../base.img",
    "absolute": "DIR/base.img",
    "absolute, odd": "//DIR/./sub/..//base.img",
    "file:": "file:DIR/base.img",
    "json:": {"driver": "FMT", "file": {"driver": "file", "filename": "DIR/base.img"}},
    "json: flat": {"driver": "FMT", "file.driver": "file", "file.filename": "DIR/base.img"},
    "json: no file driver": {"driver": "FMT", "file": {"filename": "DIR/base.img"}},
    "json: harmless options": {
        "driver": "FMT",
        "file": {
            "driver": "file",
            "filename": "DIR/base.img",
            "locking": "auto",
            "cache": {"direct": False, "no-flush": False},
        },
    },
}


def spelled(name: str | dict[str, Any], directory: Path, fmt: str) -> str:
    text = name if isinstance(name, str) else "json:" + json.dumps(name)
    return text.replace("DIR", str(directory)).replace("FMT", fmt)


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
@pytest.mark.parametrize("kind", NAMES)
def test_names_of_local_files(kind: str, fmt: str, tmp_path: Path) -> None:
    base(tmp_path / "base.img", "A", fmt)
    base(tmp_path / "sub" / "base.img", "D", fmt)  # a decoy
    assert_reads(over(tmp_path / "top.qcow2", spelled(NAMES[kind], tmp_path, fmt), fmt), "A")


def test_names_are_resolved_link_by_link(tmp_path: Path) -> None:
    """Every image's own directory counts: three directories, the same file name in each."""
    for letter, name in zip("ABC", ("a", "b", "c"), strict=True):
        base(tmp_path / name / "base.img", letter)
    over(tmp_path / "b" / "middle.qcow2", "../c/base.img")
    top = over(tmp_path / "a" / "top.qcow2", "../b/middle.qcow2")
    assert_reads(top, "C", Gate(allow=(tmp_path,)))


def test_the_working_directory_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base(tmp_path / "own" / "base.img", "A")
    base(tmp_path / "base.img", "D")
    over(tmp_path / "own" / "top.qcow2", "base.img")
    monkeypatch.chdir(tmp_path)
    assert_reads(Path("own/top.qcow2"), "A")
    monkeypatch.chdir(tmp_path / "own")
    assert_reads(Path("top.qcow2"), "A")
    assert_reads(Path("../own/./top.qcow2"), "A")


@pytest.mark.parametrize("name", ["a,b.img", "per%cent.img", "äöü.img", "sp ace.img", "a=b.img"])
def test_odd_file_names(name: str, tmp_path: Path) -> None:
    base(tmp_path / "base.img").rename(tmp_path / name)
    assert_reads(over(tmp_path / "top.qcow2", name), "A")
    quoted = "json:" + json.dumps({"driver": "qcow2", "file": {"filename": str(tmp_path / name)}})
    assert_reads(over(tmp_path / "top2.qcow2", quoted), "A")


def test_a_prefix_within_json_is_part_of_the_name(tmp_path: Path) -> None:
    """'file:/x' there is a relative name to qemu, which does not find it; nor do we."""
    base(tmp_path / "base.img")
    told = {"driver": "qcow2", "file": {"filename": f"file:{tmp_path}/base.img"}}
    top = over(tmp_path / "top.qcow2", "json:" + json.dumps(told))
    with pytest.raises(QemuError, match="No such file"):
        raw_of(top)
    with pytest.raises(Unsupported, match="relative"):
        ours(top)


def test_a_json_name_that_says_another_format(tmp_path: Path) -> None:
    """The recorded format and the name's own disagree: a guess would be needed."""
    base(tmp_path / "base.img")
    name = spelled(NAMES["json:"], tmp_path, "raw")
    with pytest.raises(Unsupported, match="says format 'raw', but 'qcow2' is recorded"):
        ours(over(tmp_path / "top.qcow2", name, "qcow2"))


def test_only_plain_names_are_plain(tmp_path: Path) -> None:
    """What a merge asks before it writes such a name anew."""
    top = tmp_path / "top.qcow2"
    for kind, name in NAMES.items():
        found = resolve_backing(spelled(name, tmp_path, "qcow2"), "qcow2", top)
        assert found.plain == (kind.split(",")[0] in ("relative", "absolute")), kind
        assert os.path.normpath(found.path) == str(tmp_path / "base.img"), kind
        assert found.format == "qcow2"


# --- symbolic links ----------------------------------------------------------------------------


def test_the_base_behind_links(tmp_path: Path) -> None:
    """A link beside the overlay, to a link, to the file: judged by where it leads."""
    base(tmp_path / "store" / "real.img", "A")
    (tmp_path / "own").mkdir()
    (tmp_path / "store" / "link.img").symlink_to("real.img")
    (tmp_path / "own" / "base.img").symlink_to("../store/link.img")
    top = over(tmp_path / "own" / "top.qcow2", "base.img")
    with pytest.raises(NotAllowed):
        ours(top)
    assert_reads(top, "A", Gate(allow=(tmp_path / "store",)))
    # An allowed directory may itself be reached by a link.
    (tmp_path / "alias").symlink_to("store")
    assert_reads(top, "A", Gate(allow=(tmp_path / "alias",)))


def test_an_overlay_behind_a_link_counts_from_the_link(tmp_path: Path) -> None:
    """As qemu: the name that was opened decides where relative names start."""
    base(tmp_path / "here" / "base.img", "A")
    base(tmp_path / "there" / "base.img", "B")
    over(tmp_path / "there" / "top.qcow2", "base.img")
    (tmp_path / "here" / "top.qcow2").symlink_to("../there/top.qcow2")
    assert_reads(tmp_path / "here" / "top.qcow2", "A")
    assert_reads(tmp_path / "there" / "top.qcow2", "B")


def test_a_middle_image_behind_a_link(tmp_path: Path) -> None:
    base(tmp_path / "here" / "base.img", "A")
    base(tmp_path / "there" / "base.img", "B")
    over(tmp_path / "there" / "middle.qcow2", "base.img")
    (tmp_path / "here" / "middle.qcow2").symlink_to("../there/middle.qcow2")
    top = over(tmp_path / "here" / "top.qcow2", "middle.qcow2")
    assert_reads(top, "A", Gate(allow=(tmp_path,)))


def test_directories_behind_links(tmp_path: Path) -> None:
    """`sub/..` goes up from where `sub` leads, as the kernel does, not by its letters."""
    base(tmp_path / "base.img", "D")
    base(tmp_path / "far" / "base.img", "A")
    (tmp_path / "far" / "away").mkdir()
    (tmp_path / "sub").symlink_to("far/away")
    top = over(tmp_path / "top.qcow2", "sub/../base.img")
    with pytest.raises(NotAllowed):
        ours(top)
    assert_reads(top, "A", Gate(allow=(tmp_path / "far",)))


# --- evidence copied elsewhere -------------------------------------------------------------------


def copied(tmp_path: Path, formats: str = "qcow2") -> tuple[Path, bytes]:
    """A chain of three whose lower two lie in another directory than they record."""
    name = "base.img"
    base(tmp_path / name, "A", formats)
    over(tmp_path / "middle.qcow2", str(tmp_path / name), formats)
    top = over(tmp_path / "top.qcow2", str(tmp_path / "middle.qcow2"))
    qemu_io(top, ["write -q -P 5 192k 64k"], "qcow2")
    expected = raw_of(top)
    evidence = tmp_path / "evidence"
    evidence.mkdir()
    for each in (name, "middle.qcow2"):
        shutil.move(tmp_path / each, evidence / each)
    return top, expected


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_search_finds_the_whole_chain(fmt: str, tmp_path: Path) -> None:
    top, expected = copied(tmp_path, fmt)
    with pytest.raises(ImageError, match="missing"):
        ours(top)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert ours(top, Gate(search=(empty, tmp_path / "evidence"))) == expected
    with pytest.raises(ImageError, match="missing"):
        ours(top, Gate(search=(empty,)))


def test_search_never_replaces_what_is_there(tmp_path: Path) -> None:
    base(tmp_path / "base.img", "A")
    base(tmp_path / "evidence" / "base.img", "B")
    top = over(tmp_path / "top.qcow2", "base.img")
    gate = Gate(search=(tmp_path / "evidence",))
    assert_reads(top, "A", gate)
    (tmp_path / "base.img").unlink()
    assert ours(top, gate) == content("B")


def test_the_first_directory_wins(tmp_path: Path) -> None:
    for letter in "BC":
        base(tmp_path / letter / "base.img", letter)
    top = over(tmp_path / "top.qcow2", "base.img")
    for order in ("BC", "CB"):
        gate = Gate(search=tuple(tmp_path / letter for letter in order))
        assert ours(top, gate) == content(order[0])


@pytest.mark.parametrize("kind", ["file:", "json:"])
def test_search_for_other_kinds_of_names(kind: str, tmp_path: Path) -> None:
    """Written on another machine: the directory does not exist here."""
    base(tmp_path / "evidence" / "base.img", "A")
    name = spelled(NAMES[kind], Path("/no/such/directory"), "qcow2")
    top = over(tmp_path / "top.qcow2", name)
    assert ours(top, Gate(search=(tmp_path / "evidence",))) == content("A")


def test_search_for_a_data_file(tmp_path: Path) -> None:
    data = tmp_path / "elsewhere.data"
    top = tmp_path / "own" / "top.qcow2"
    top.parent.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", top, str(SIZE))
    qemu_io(top, ["write -q -P 3 4k 8k"], "qcow2")
    expected = raw_of(top)
    evidence = tmp_path / "evidence"
    evidence.mkdir()
    shutil.move(data, evidence / data.name)
    assert ours(top, Gate(search=(evidence,))) == expected


def test_a_missing_base_as_zeroes(tmp_path: Path) -> None:
    """What is missing reads as zeroes; what is there reads as ever, and the chain says so."""
    top, whole = copied(tmp_path)
    (tmp_path / "evidence" / "base.img").unlink()
    gate = Gate(search=(tmp_path / "evidence",), missing_zero=True)
    with open_chain(top, gate) as chain:
        assert [layer.path.name for layer in chain.layers] == ["top.qcow2", "middle.qcow2"]
        assert chain.missing is not None and chain.missing.name == "base.img"
        found = read(chain.layers, 0, chain.size)
    # The judge: the same chain without a backing file at its end.
    middle = tmp_path / "evidence" / "middle.qcow2"
    qemu_img("rebase", "-u", "-b", "", middle)
    qemu_img("rebase", "-u", "-b", str(middle), "-F", "qcow2", top)
    expected = raw_of(top)
    assert found == expected != whole
    assert any(expected[192 << 10 :]) and not any(expected[: 64 << 10])


def test_nothing_missing_nothing_said(tmp_path: Path) -> None:
    base(tmp_path / "base.img")
    with open_chain(over(tmp_path / "top.qcow2", "base.img"), Gate(missing_zero=True)) as chain:
        assert chain.missing is None
        assert len(chain.layers) == 2


def test_missing_below_the_disks_end(tmp_path: Path) -> None:
    """A layer that is shorter hides what is missing below, too: zeroes either way."""
    built = build_chain(
        tmp_path, ["256k:A", "[cluster=4k size=64k] 4k:B", "[size=256k] 128k:- 4k:C"]
    )
    whole = raw_of(built.active)
    built.base.unlink()
    found = ours(built.active, Gate(missing_zero=True))
    assert found[:4096] == whole[:4096] and found[64 << 10 :] == whole[64 << 10 :]
    assert not any(found[4096 : 64 << 10])


# --- block devices -------------------------------------------------------------------------------


@pytest.fixture
def devices() -> Iterator[list[Path]]:
    """Loop devices to detach at the end."""
    made: list[Path] = []
    yield made
    for device in made:
        subprocess.run(["losetup", "-d", str(device)], check=True)


def attach(devices: list[Path], file: Path, *options: str) -> Path:
    """A loop device over `file`; where there is none to be had, the test is skipped."""
    program = shutil.which("losetup", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        pytest.skip("losetup is not installed")
    done = subprocess.run(
        [program, *options, "--show", "-f", str(file)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no loop device to be had: {done.stderr.strip()}")
    devices.append(Path(done.stdout.strip()))
    return devices[-1]


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_block_device_below(fmt: str, devices: list[Path], tmp_path: Path) -> None:
    """Outside of the image's directory like any other file: it has to be allowed."""
    device = attach(devices, base(tmp_path / "base.img", "A", fmt), "-r")
    top = over(tmp_path / "top.qcow2", str(device), fmt)
    with pytest.raises(NotAllowed, match="--allow /dev"):
        ours(top)
    for gate in (Gate(allow=(Path("/dev"),)), Gate(follow=True)):
        assert_reads(top, "A", gate)
    with open_chain(top, Gate(follow=True)) as chain:
        below = chain.layers[1]
        assert below.format == fmt
        assert below.file.is_block_device
        assert below.size == SIZE
        assert below.file.size == device_size(device)


def device_size(device: Path) -> int:
    return int(subprocess.check_output(["blockdev", "--getsize64", str(device)]))


def test_block_devices_by_json(devices: list[Path], tmp_path: Path) -> None:
    device = attach(devices, base(tmp_path / "base.img", "A", "raw"), "-r")
    told = {"driver": "raw", "file": {"driver": "host_device", "filename": str(device)}}
    top = over(tmp_path / "top.qcow2", "json:" + json.dumps(told), "raw")
    with pytest.raises(NotAllowed):
        ours(top)
    assert_reads(top, "A", Gate(allow=(Path("/dev"),)))


def test_a_link_to_a_block_device(devices: list[Path], tmp_path: Path) -> None:
    """As LVM and udev make them: judged by where the link leads, so not by its directory."""
    device = attach(devices, base(tmp_path / "base.img", "A", "raw"), "-r")
    (tmp_path / "volume").symlink_to(device)
    top = over(tmp_path / "top.qcow2", "volume", "raw")
    with pytest.raises(NotAllowed):
        ours(top)
    assert_reads(top, "A", Gate(allow=(Path("/dev"),)))


def test_qcow2_on_a_device_larger_than_the_image(devices: list[Path], tmp_path: Path) -> None:
    """As oVirt keeps them on logical volumes; the chain's top too."""
    for name, letter in (("a", "A"), ("b", "B")):
        file = base(tmp_path / f"{name}.img", letter)
        with file.open("r+b") as opened:
            opened.truncate(4 << 20)
    below = attach(devices, tmp_path / "a.img", "-r")
    qemu_img("rebase", "-u", "-b", str(below), "-F", "qcow2", tmp_path / "b.img")
    qemu_io(tmp_path / "b.img", ["discard -q 128k 128k", "write -q -P 9 64k 64k"], "qcow2")
    top = attach(devices, tmp_path / "b.img", "-r")
    expected = raw_of(top)
    # The devices are neighbours: in the directory of the image that was named.
    assert ours(top) == expected == ours(tmp_path / "b.img", Gate(follow=True))


def test_a_block_device_as_data_file(devices: list[Path], tmp_path: Path) -> None:
    store, top = tmp_path / "store", tmp_path / "top.qcow2"
    store.write_bytes(bytes(SIZE))
    device = attach(devices, store)
    words = f"data_file={device},data_file_raw=on"
    qemu_img("create", "-q", "-f", "qcow2", "-o", words, top, str(SIZE))
    qemu_io(top, ["write -q -P 5 0 64k", "write -q -P 6 70k 1k"], "qcow2")
    with pytest.raises(NotAllowed, match="--allow /dev"):
        ours(top)
    expected = raw_of(top)
    assert expected.count(5) == 65536 and expected.count(6) == 1024
    assert ours(top, Gate(allow=(Path("/dev"),))) == expected


def test_two_devices_over_one_file_are_two(devices: list[Path], tmp_path: Path) -> None:
    """A device is known by its number, not by the node's inode: a second node is the same one."""
    file = base(tmp_path / "base.img", "A")
    device = attach(devices, file)
    qemu_img("rebase", "-u", "-b", str(device), "-F", "qcow2", device)
    with pytest.raises(ImageError, match="loops"):
        ours(device, Gate(follow=True))
    node = tmp_path / "node"
    os.mknod(node, 0o600 | 0o060000, os.stat(device).st_rdev)  # noqa: PTH116
    with pytest.raises(ImageError, match="loops"):
        ours(node, Gate(follow=True))


def test_reading_leaves_a_device_alone(devices: list[Path], tmp_path: Path) -> None:
    file = base(tmp_path / "base.img", "A", "raw")
    device = attach(devices, file, "-r")
    top = over(tmp_path / "top.qcow2", str(device), "raw")
    before = (file.read_bytes(), file.stat().st_mtime_ns, top.read_bytes(), top.stat().st_mtime_ns)
    ours(top, Gate(follow=True))
    assert before == (
        file.read_bytes(), file.stat().st_mtime_ns, top.read_bytes(), top.stat().st_mtime_ns
    )  # fmt: skip
