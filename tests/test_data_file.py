"""External data files, raw and not: content and map are those of qemu-img."""

from __future__ import annotations

import hashlib
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.build import build_chain
from fixtures.oracle import qemu_img, qemu_io, qemu_map, raw_of
from fixtures.shadow import pattern
from qchain.chain.chain import open_chain
from qchain.chain.digest import digest
from qchain.chain.extents import extents
from qchain.chain.gate import Gate
from qchain.chain.reader import read
from qchain.errors import ImageError, NotAllowed
from qchain.hostfile import HostFile
from qchain.qcow2.header import read_header
from qchain.verify.compare import compare

M = 1 << 20
RAW = ",data_file_raw=on"


def make(image: Path, size: str, options: str = "", data: Path | None = None) -> Path:
    """An image whose data lie in `data`, by default beside it."""
    where = data or image.with_name(image.name + ".data")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={where}{options}", image, size)
    return image


def put(image: Path, letter: str, start: int, length: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "p").write_bytes(pattern(letter, start, length))
        qemu_io(image, [f"write -q -s p {start} {length}"], "qcow2", cwd=Path(scratch))


def ours(image: Path, gate: Gate | None = None) -> bytes:
    with open_chain(image, gate) as chain:
        content = read(chain.layers, 0, chain.size)
        assert digest(chain.layers) == hashlib.sha256(content).hexdigest()
    return content


def our_map(image: Path) -> list[dict[str, Any]]:
    with open_chain(image) as chain:
        found = [extent.as_json() for extent in extents(chain.layers)]
    assert not any(each.pop("compressed") for each in found)
    return found


def qemus_map(image: Path) -> list[dict[str, Any]]:
    """qemu-img's map, its cuts at tables and at each GiB joined.

    It also says what is a hole of the data file ('zero' and 'data' at once); ours says what
    the image says.
    """
    out: list[dict[str, Any]] = []
    for each in qemu_map(image):
        if each["data"]:
            each["zero"] = False
        if out:
            follows = {**out[-1], "start": each["start"], "length": each["length"]}
            if "offset" in follows:
                follows["offset"] += out[-1]["length"]
            if follows == each:
                out[-1]["length"] += each["length"]
                continue
        out.append(each)
    return out


def assert_as_qemu(image: Path) -> bytes:
    expected = raw_of(image)
    assert ours(image) == expected
    assert our_map(image) == qemus_map(image)
    return expected


LAYOUTS = {
    "plain": "",
    "small clusters": ",cluster_size=512",
    "large clusters": ",cluster_size=2M",
    "extended": ",extended_l2=on",
    "preallocated": ",preallocation=metadata",
    "fully preallocated": ",preallocation=full",
}


@pytest.mark.parametrize("raw", ["", RAW], ids=["", "raw"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, raw: str, tmp_path: Path) -> None:
    image = make(tmp_path / "a.qcow2", "6M", LAYOUTS[layout] + raw)
    assert_as_qemu(image)
    put(image, "A", 0, 65536)  # guest offset 0 is host offset 0: only COPIED tells it from none
    put(image, "B", 3 * M - 512, 1024)
    put(image, "C", 5 * M, M)
    assert_as_qemu(image)
    qemu_io(
        image, [f"write -q -z {5 * M} 300k", "write -q -z -u 0 4k", "discard -q 3M 64k"], "qcow2"
    )
    content = assert_as_qemu(image)
    assert content[3 * M - 512 : 3 * M] == pattern("B", 3 * M - 512, 512)


def test_raw_data_file_is_the_disk(tmp_path: Path) -> None:
    """With the raw bit the data file itself reads as the disk does, whichever way it is read."""
    image = make(tmp_path / "a.qcow2", "4M", RAW)
    put(image, "A", M, 100 << 10)
    qemu_io(image, ["write -q -z 1M 4k"], "qcow2")
    data = tmp_path / "a.qcow2.data"
    assert ours(image) == data.read_bytes() == assert_as_qemu(image)
    with open_chain(image) as chain, open_chain(data, fmt="raw") as flat:
        assert compare(chain.layers, flat.layers).identical
        assert compare(chain.layers, flat.layers, everything=True).identical


def test_raw_data_file_changed_behind_our_back(tmp_path: Path) -> None:
    """Never written clusters of a raw data file are read through the map, as qemu does."""
    image = make(tmp_path / "a.qcow2", "4M", RAW)
    put(image, "A", M, 65536)
    with (tmp_path / "a.qcow2.data").open("r+b") as file:
        file.seek(2 * M)
        file.write(b"\xee" * 512)
        file.seek(M)
        file.write(b"\xdd" * 512)
    content = assert_as_qemu(image)
    assert content[M : M + 512] == b"\xdd" * 512


def test_without_the_raw_bit_the_map_decides(tmp_path: Path) -> None:
    """What lies in the data file where the map has nothing is not the guest's."""
    image = make(tmp_path / "a.qcow2", "4M")
    put(image, "A", M, 65536)
    with (tmp_path / "a.qcow2.data").open("r+b") as file:
        file.truncate(4 * M)
        file.seek(2 * M)
        file.write(b"\xee" * 65536)
    content = assert_as_qemu(image)
    assert not any(content[2 * M :])


def test_in_chains(tmp_path: Path) -> None:
    """Under an overlay, over a backing file, and both with data files of their own."""
    base = build_chain(tmp_path, ["[size=4M] 2M:A 64k:B"]).base
    middle = tmp_path / "middle.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", "-o",
             f"data_file={tmp_path}/middle.data", middle)  # fmt: skip
    put(middle, "C", M - 512, 66 << 10)
    qemu_io(middle, ["write -q -z 0 64k"], "qcow2")
    assert_as_qemu(middle)
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", middle.name, "-F", "qcow2", "-o",
             f"data_file={tmp_path}/top.data,cluster_size=4k", top)  # fmt: skip
    put(top, "D", 512, 3072)
    put(top, "E", 3 * M, 4096)
    content = assert_as_qemu(top)
    assert content[512:1024] == pattern("D", 512, 512)
    assert content[M : M + 512] == pattern("C", M, 512)
    assert content[M + 512 * 512 : M + 513 * 512] == pattern("A", M + 512 * 512, 512)
    plain = tmp_path / "plain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", top.name, "-F", "qcow2", plain)
    put(plain, "F", 0, 512)
    assert_as_qemu(plain)


def test_a_raw_data_file_forbids_a_backing_file(tmp_path: Path) -> None:
    """qemu refuses to make it, and to open it when it was made by hand: so do we."""
    base = build_chain(tmp_path, ["1M:A"]).base
    image = make(tmp_path / "a.qcow2", "1M")
    qemu_img("rebase", "-u", "-b", base.name, "-F", "qcow2", image)
    assert_as_qemu(image)
    with image.open("r+b") as file:
        file.seek(88)
        file.write(struct.pack(">Q", 2))
    assert qemu_img("info", "-f", "qcow2", image, ok=(0, 1)).returncode in (0, 1)
    with HostFile(image) as opened:
        header = read_header(opened)
    refused = qemu_img("map", "-f", "qcow2", image, ok=(0, 1)).returncode == 1
    assert refused == (not header.readable), header.findings


@pytest.mark.parametrize("size", [0, 512, 70000])
def test_a_data_file_that_is_too_short(size: int, tmp_path: Path) -> None:
    """What it lacks reads as zeroes, as in qemu."""
    image = make(tmp_path / "a.qcow2", "1M")
    put(image, "A", 0, M)
    with (tmp_path / "a.qcow2.data").open("r+b") as file:
        file.truncate(size)
    expected = raw_of(image)
    assert ours(image) == expected == pattern("A", 0, M)[:size].ljust(M, b"\0")


def test_far_out(tmp_path: Path) -> None:
    """A data file of terabytes, nearly all of it a hole."""
    image = make(tmp_path / "a.qcow2", "5T", ",cluster_size=2M")
    far = (5 << 40) - 4096
    put(image, "A", far, 4096)
    put(image, "B", (2 << 40) + 512, 512)
    assert our_map(image) == qemus_map(image)
    with open_chain(image) as chain:
        assert read(chain.layers, far, 9999) == pattern("A", far, 4096)
        assert read(chain.layers, 2 << 40, 1024) == bytes(512) + pattern("B", (2 << 40) + 512, 512)


# --- which file it is ------------------------------------------------------------------------


def rename_data_file(image: Path, name: str) -> None:
    """Record another name of the same length or shorter, by hand."""
    content = bytearray(image.read_bytes())
    at = content.index(struct.pack(">I", 0x44415441))
    (length,) = struct.unpack_from(">I", content, at + 4)
    raw = name.encode()
    assert len(raw) <= length
    content[at + 8 : at + 8 + length] = raw.ljust(length, b"\0")
    image.write_bytes(content)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, relative, through a symbolic link; a moved image finds the file moved with it.

    qemu takes a relative name from its working directory (unlike a backing file's): here
    that is the image's own, where both agree.
    """
    image = make(tmp_path / "a.qcow2", "1M")
    put(image, "A", 0, 65536)
    expected = assert_as_qemu(image)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("a.qcow2.data", "./a.qcow2.data", "sub/../a.qcow2.data"):
        rename_data_file(image, name)
        assert assert_as_qemu(image) == expected, name
    (tmp_path / "link").symlink_to("a.qcow2.data")
    rename_data_file(image, "link")
    assert assert_as_qemu(image) == expected
    for name in ("a.qcow2", "a.qcow2.data", "link"):
        shutil.move(tmp_path / name, tmp_path / "sub" / name)
    monkeypatch.chdir(tmp_path / "sub")
    assert assert_as_qemu(tmp_path / "sub" / "a.qcow2") == expected


def test_a_relative_name_never_depends_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where qemu would read another file of that name, the one beside the image is read."""
    image = make(tmp_path / "a.qcow2", "1M")
    put(image, "A", 0, 65536)
    rename_data_file(image, "a.qcow2.data")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.qcow2.data").write_bytes(b"\xee" * M)
    monkeypatch.chdir(elsewhere)
    assert raw_of(image)[:65536] == b"\xee" * 65536
    assert ours(image) == pattern("A", 0, 65536) + bytes(M - 65536)


def test_the_gate_decides(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    image = make(tmp_path / "a.qcow2", "1M", data=other / "a.data")
    put(image, "A", 0, 65536)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(NotAllowed, match=r"--allow .*/other"):
        ours(image)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    expected = raw_of(image)
    for gate in (Gate(allow=(other,)), Gate(follow=True), Gate(search=(other,))):
        assert ours(image, gate) == expected
    (tmp_path / "link.data").symlink_to(other / "a.data")
    rename_data_file(image, "link.data")
    with pytest.raises(NotAllowed):
        ours(image)


def test_missing_and_unnamed(tmp_path: Path) -> None:
    image = make(tmp_path / "a.qcow2", "1M")
    (tmp_path / "a.qcow2.data").rename(tmp_path / "elsewhere")
    with pytest.raises(ImageError, match="no such file"):
        ours(image)
    rename_data_file(image, "")
    with pytest.raises(ImageError, match="without a name"):
        ours(image)


@pytest.mark.parametrize("start", ["0", "64k"])
@pytest.mark.parametrize("how", ["-z", "-z -u", "-P 0"])
def test_zeroes_at_offset_zero(how: str, start: str, tmp_path: Path) -> None:
    """Offset 0 with COPIED is a place of data, but a zero cluster with it has none."""
    image = make(tmp_path / "a.qcow2", "1M")
    qemu_io(image, [f"write -q -P 7 {start} 64k", f"write -q {how} {start} 64k"], "qcow2")
    assert_as_qemu(image)


def test_a_missing_data_file_never_reads_as_zeroes(tmp_path: Path) -> None:
    """`missing_zero` is for backing files: a data file is the image itself."""
    image = make(tmp_path / "a.qcow2", "1M")
    put(image, "A", 0, 512)
    (tmp_path / "a.qcow2.data").unlink()
    with pytest.raises(ImageError, match="no such file"):
        ours(image, Gate(missing_zero=True))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    options=st.sampled_from(["", ",cluster_size=4k", ",extended_l2=on", ",cluster_size=512"]),
    raw=st.sampled_from(["", RAW]),
    sectors=st.integers(1, 3000),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["-P 7", "-P 8", "-P 0", "-z", "-z -u", "discard"]),
            st.floats(0, 1),
            st.integers(1, 400),
        ),
        max_size=8,
    ),
)
def test_random(options: str, raw: str, sectors: int, steps: list[tuple[str, float, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        image = make(Path(directory) / "a.qcow2", str(sectors * 512), options + raw)
        commands = []
        for how, at, length in steps:
            start = int(at * (sectors - 1))
            verb = "discard -q" if how == "discard" else f"write -q {how}"
            commands.append(f"{verb} {start * 512} {min(length, sectors - start) * 512}")
        if commands:
            qemu_io(image, commands, "qcow2")
        assert_as_qemu(image)
