"""Header, snapshots, bitmaps and refcounts as qchain reads them, against qemu-img."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.oracle import qemu_img, qemu_info
from qchain.hostfile import HostFile
from qchain.qcow2 import structures
from qchain.qcow2.bitmaps import read_bitmaps
from qchain.qcow2.header import Header, read_header
from qchain.qcow2.heads import (
    BitmapHead,
    BitmapsExtension,
    HeaderTail,
    HeaderV2,
    LuksPointer,
    SnapshotHead,
    extension_head,
    feature_name,
    snapshot_extra,
)
from qchain.qcow2.refcounts import (
    BadBlock,
    decode_refcounts,
    read_refcount,
    read_refcount_table,
    refcount_blocks,
)
from qchain.qcow2.snapshots import read_snapshots

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
U16 = st.integers(0, 2**16 - 1)


def header_of(image: Path) -> Header:
    with HostFile(image) as file:
        return read_header(file)


def same_as_qemu(image: Path) -> Header:
    """Every field that qemu-img info shows is the same here."""
    info, header = qemu_info(image), header_of(image)
    data = info["format-specific"]["data"]
    assert header.problems == ()
    assert header.readable
    header.require_readable(image)
    assert header.size == info["virtual-size"]
    assert header.cluster_size == info["cluster-size"]
    assert {2: "0.10", 3: "1.1"}[header.version] == data["compat"]
    assert header.backing_name == info.get("backing-filename")
    assert header.backing_format == info.get("backing-filename-format")
    assert header.refcount_bits == data["refcount-bits"]
    assert header.compression == data["compression-type"]
    assert header.extended_l2 == data.get("extended-l2", False)
    assert header.data_file_name == data.get("data-file")
    assert header.data_file_raw == data.get("data-file-raw", False)
    assert ("lazy refcounts" in header.compatible_names) == data.get("lazy-refcounts", False)
    assert header.corrupt == data.get("corrupt", False)
    assert header.dirty == info.get("dirty-flag", False)
    assert (header.encryption is not None) == info.get("encrypted", False)
    return header


@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_cluster_sizes_and_versions(tmp_path: Path, cluster_bits: int) -> None:
    cluster = 1 << cluster_bits
    for compat, size in itertools.product(("0.10", "1.1"), (0, 512, 1 << 20, (1 << 26) + 512)):
        image = tmp_path / f"{compat}-{size}"
        options = f"compat={compat},cluster_size={cluster}"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, size)
        header = same_as_qemu(image)
        assert header.cluster_bits == cluster_bits
        assert header.l2_entries == cluster // 8
        assert header.subcluster_size == cluster
        assert header.warnings == ()


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("extended", ["off", "on"])
@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_version_3_options(tmp_path: Path, order: int, extended: str, compression: str) -> None:
    image = tmp_path / "image"
    options = (
        f"refcount_bits={1 << order},extended_l2={extended},compression_type={compression},"
        f"lazy_refcounts={'on' if order == 4 else 'off'}"
    )
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "10M")
    header = same_as_qemu(image)
    assert header.refcount_order == order
    names = (["compression type"] if compression == "zstd" else []) + (
        ["extended L2"] if extended == "on" else []
    )
    assert header.incompatible_names == names
    assert header.l2_entry_size == (16 if extended == "on" else 8)
    assert header.subcluster_size == (2048 if extended == "on" else 65536)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize(
    "name",
    ["b.raw", "../x/ü b.raw", "a,b'\"\n\t.raw", "json:{}", "n" * 1023, "p:q", b"\xff\xfe.raw"],
)
def test_backing_names(tmp_path: Path, compat: str, name: str | bytes) -> None:
    """The name byte for byte; -u, for the files need not exist."""
    image = tmp_path / "image"
    options = ["-F", "raw", "-o", f"compat={compat}"]
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", name, *options, image, "10M"],
        check=True,
        capture_output=True,
    )
    header = header_of(image)
    expected = name if isinstance(name, bytes) else os.fsencode(name)
    assert header.backing_name is not None
    assert os.fsencode(header.backing_name) == expected
    assert header.backing_format == "raw"
    assert header.problems == ()


def test_backing_format_absent(tmp_path: Path) -> None:
    """An old image without the extension: poked away, qemu-img would not write one."""
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "b", "-F", "raw", image, "1M")
    raw = bytearray(image.read_bytes())
    at = raw.index(b"\xe2\x79\x2a\xca")
    raw[at : at + 4] = b"\x12\x34\x56\x78"
    image.write_bytes(raw)
    header = header_of(image)
    assert header.backing_name == "b"
    assert header.backing_format is None
    assert (0x12345678, b"raw") in header.extensions


def test_data_file(tmp_path: Path) -> None:
    for raw in ("on", "off"):
        image = tmp_path / f"image-{raw}"
        options = f"data_file={tmp_path}/data-{raw},data_file_raw={raw}"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "1M")
        header = same_as_qemu(image)
        assert header.has_data_file
        assert header.incompatible_names == ["external data file"]
        assert header.autoclear_names == (["raw external data"] if raw == "on" else [])


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_encryption(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    secret = ["--object", "secret,id=s,data=abc"]
    options = f"encrypt.format={kind},encrypt.key-secret=s"
    if kind == "luks":
        options += ",encrypt.iter-time=10"
    qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", options, image, "1M")
    header = same_as_qemu(image)
    assert header.encryption == kind
    if kind == "luks":
        assert header.luks_header is not None
        with HostFile(image) as file:
            assert file.pread(header.luks_header.offset, 6) == b"LUKS\xba\xbe"
        assert header.luks_header.offset + header.luks_header.length <= image.stat().st_size
    else:
        assert header.luks_header is None


def test_feature_names(tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    names = header_of(image).feature_names
    assert names[0, 0] == "dirty bit"
    assert names[0, 4] == "extended L2 entries"
    assert names[1, 0] == "lazy refcounts"
    assert names[2, 1] == "raw external data"


@pytest.mark.parametrize(
    ("cluster", "length", "name_at"),
    [
        ("2M", 100_000, 2_000_000),
        # Around the first 4 KiB: the extension, the head of the next one, the name.
        *(("64k", 3976 + more, 8192) for more in (-24, -16, -8, 0, 8)),
        *(("64k", 8, 4096 + more) for more in (-1024, -1023, -5, -4, -1, 0, 1)),
    ],
)
def test_names_beyond_the_first_read(
    tmp_path: Path, cluster: str, length: int, name_at: int
) -> None:
    """An extension and the name lie beyond what is read at first."""
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", image, "1M")
    raw = bytearray(image.read_bytes())
    data = b"x" * length
    first = (0xABCD0001).to_bytes(4, "big") + length.to_bytes(4, "big") + data
    second = b"\xe2\x79\x2a\xca" + (3).to_bytes(4, "big") + b"raw\0\0\0\0\0" + bytes(8)
    raw[112 : 112 + len(first + second)] = first + second
    raw[8:20] = name_at.to_bytes(8, "big") + (5).to_bytes(4, "big")
    raw[name_at : name_at + 5] = b"b.raw"
    image.write_bytes(raw)
    qemu_img("create", "-q", "-f", "raw", tmp_path / "b.raw", "1M")
    header = same_as_qemu(image)
    assert header.backing_name == "b.raw"
    assert header.backing_format == "raw"
    assert header.extensions[0].data == data


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_snapshots(tmp_path: Path, compat: str) -> None:
    image = tmp_path / "image"
    options = f"compat={compat},cluster_size=512"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "1M")
    assert read_snapshots(HostFile(image), header_of(image)) == []
    names = ["one", "zwei ü", "x" * 200, "4"]
    for name in names:
        qemu_img("snapshot", "-c", name, image)
    if compat == "1.1":
        qemu_img("resize", "-q", image, "2M")
    header = same_as_qemu(image)
    with HostFile(image) as file:
        found = read_snapshots(file, header)
        table = [file.pread(s.l1_table_offset, s.l1_size * 8) for s in found]
    assert [s.name for s in found] == names
    assert all(s.disk_size == 1 << 20 for s in found)
    assert all(len(t) == s.l1_size * 8 for t, s in zip(table, found, strict=True))
    for ours, theirs in zip(found, qemu_info(image)["snapshots"], strict=True):
        assert ours.id == theirs["id"]
        assert ours.name == theirs["name"]
        assert ours.date_sec == theirs["date-sec"]
        assert ours.date_nsec == theirs["date-nsec"]
        assert ours.vm_clock_nsec == theirs["vm-clock-sec"] * 10**9 + theirs["vm-clock-nsec"]
        assert ours.vm_state_size == theirs["vm-state-size"]
        assert ours.icount == theirs.get("icount")


def test_many_snapshots(tmp_path: Path) -> None:
    """More of a table than one piece of `Window`, written by construct, read back by both."""
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "1M")
    header = header_of(image)
    raw = bytearray(image.read_bytes().ljust(65536, b"\0"))
    table = b""
    for index in range(1000):
        extra = (
            structures.SNAPSHOT_EXTRA.build(
                {
                    "vm_state_size": index << 33,
                    "disk_size": index * 512,
                    "icount": 2**64 - 1 - index,
                }
            )[: (0, 8, 16, 24)[index % 4]]
            if index % 5
            else b"y" * 40
        )
        name = f"snapshot {index} ".encode() + b"z" * (index % 200)
        table += structures.SNAPSHOT_ENTRY.build(
            {"l1_table_offset": header.l1_table_offset, "l1_size": header.l1_size}
            | {"id_size": len(str(index)), "name_size": len(name), "date_sec": index}
            | {"date_nsec": index * 3, "vm_clock_nsec": index << 32, "vm_state_size": index}
            | {"extra_size": len(extra), "extra": extra, "id": str(index).encode(), "name": name}
        )
    assert len(table) > 1 << 17
    raw[60:72] = (1000).to_bytes(4, "big") + (65536).to_bytes(8, "big")
    image.write_bytes(raw + table)
    header = header_of(image)
    with HostFile(image) as file:
        found = read_snapshots(file, header)
    theirs = qemu_info(image)["snapshots"]
    assert len(found) == len(theirs) == 1000
    for ours, their in zip(found, theirs, strict=True):
        assert (ours.id, ours.name) == (their["id"], their["name"])
        assert ours.vm_state_size == their["vm-state-size"] % 2**64
        # Absent unless the extra data reaches it; qemu-img prints it as signed.
        icount = their.get("icount")
        assert ours.icount == (None if icount is None else icount % 2**64)
        index = int(ours.id)
        if index % 5:
            assert ours.disk_size == (index * 512 if index % 4 >= 2 else header.size)


def test_bitmaps(tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", image, "100M")
    assert read_bitmaps(HostFile(image), header_of(image)) == []
    for name, granularity, enabled in (
        ("a", 512, True),
        ("b ü", 65536, False),
        ("c" * 1000, 1 << 31, True),
    ):
        switch = ["--enable"] if enabled else ["--disable"]
        qemu_img("bitmap", "--add", *switch, "-g", granularity, image, name)
    header = same_as_qemu(image)
    assert header.autoclear_names == ["bitmaps"]
    with HostFile(image) as file:
        found = read_bitmaps(file, header)
    theirs = qemu_info(image)["format-specific"]["data"]["bitmaps"]
    assert len(found) == 3
    by_name = {b["name"]: b for b in theirs}
    for bitmap in found:
        assert by_name[bitmap.name]["granularity"] == bitmap.granularity
        assert sorted(by_name[bitmap.name]["flags"]) == sorted(bitmap.flags)
    # A program without bitmap support wrote to it: all of them are stale.
    raw = bytearray(image.read_bytes())
    raw[95] = 0
    image.write_bytes(raw)
    header = header_of(image)
    assert header.problems == ()
    assert header.warnings
    assert read_bitmaps(HostFile(image), header) == []


@pytest.mark.parametrize("order", range(7))
def test_refcounts_of_an_image(tmp_path: Path, order: int) -> None:
    """Cluster by cluster against construct, and against what qemu must have counted."""
    image = tmp_path / "image"
    options = f"cluster_size=512,refcount_bits={1 << order}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "4M")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write 0 300k", "-c", "write 2M 100k", str(image)],
        check=True,
        capture_output=True,
    )
    if order >= 1:
        qemu_img("snapshot", "-c", "s", image)
    header = header_of(image)
    raw = image.read_bytes()
    total = -(-len(raw) // 512)
    expected = [0] * total
    table_at, table_size = header.refcount_table_offset, header.refcount_table_clusters * 512
    per_block = 512 * 8 >> order
    for index in range(table_size // 8):
        entry = structures.REFCOUNT_TABLE_ENTRY.parse(raw[table_at + index * 8 :][:8])
        if entry.offset:
            block = raw[entry.offset : entry.offset + 512]
            for k, value in enumerate(structures.refcount_block(order, per_block).parse(block)):
                if index * per_block + k < total:
                    expected[index * per_block + k] = value
    with HostFile(image) as file:
        bulk = np.zeros(total, np.uint64)
        for first, counts in refcount_blocks(file, header):
            part = counts[: max(0, total - first)]
            bulk[first : first + len(part)] = part
        step = max(1, total // 200)
        for cluster in [*range(0, total, step), total - 1]:
            assert read_refcount(file, header, cluster) == expected[cluster]
        assert read_refcount(file, header, 1 << 50) == 0
        assert read_refcount_table(file, header).dtype == np.uint64
    assert bulk.tolist() == expected
    # Header cluster, and everything that qemu wrote, is in use; shared with the snapshot: 2.
    assert expected[0] == 1
    assert max(expected) == (2 if order else 1)
    assert sum(1 for value in expected if value) >= 800


@pytest.mark.parametrize("order", range(7))
def test_single_refcounts(tmp_path: Path, order: int) -> None:
    """Each place within a block, filled with noise, against construct."""
    image = tmp_path / "image"
    options = f"cluster_size=512,refcount_bits={1 << order}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "1M")
    header = header_of(image)
    raw = bytearray(image.read_bytes())
    entry = structures.REFCOUNT_TABLE_ENTRY.parse(raw[header.refcount_table_offset :][:8])
    noise = random.Random(order).randbytes(512)
    raw[entry.offset : entry.offset + 512] = noise
    image.write_bytes(raw)
    count = 4096 >> order
    expected = list(structures.refcount_block(order, count).parse(noise))
    with HostFile(image) as file:
        assert [read_refcount(file, header, k) for k in range(count)] == expected
        assert next(refcount_blocks(file, header))[1].tolist() == expected


def test_bad_refcount_blocks(tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", image, "1M")
    header = header_of(image)
    raw = bytearray(image.read_bytes())
    at = header.refcount_table_offset
    good = int.from_bytes(raw[at : at + 8], "big")
    for index, offset in enumerate((good, 1 << 40, good + 512, good)):
        raw[at + index * 8 : at + index * 8 + 8] = offset.to_bytes(8, "big")
    image.write_bytes(raw)
    bad: list[BadBlock] = []
    with HostFile(image) as file:
        assert [first for first, _ in refcount_blocks(file, header, bad)] == [0]
    assert [(b.table_index, b.offset) for b in bad] == [(1, 1 << 40), (2, good + 512), (3, good)]


@given(order=st.integers(0, 6), raw=st.binary(min_size=8, max_size=64))
@settings(deadline=None)
def test_refcount_decoder_is_construct(order: int, raw: bytes) -> None:
    raw = raw[: len(raw) // 8 * 8]
    count = len(raw) * 8 >> order
    decoded = decode_refcounts(raw, order)
    declared = structures.refcount_block(order, count)
    assert decoded.tolist() == list(declared.parse(raw))
    assert declared.build(decoded.tolist()) == raw


def test_sub_byte_refcounts_by_hand() -> None:
    """Least significant bit first (specification, "Host cluster management")."""
    assert decode_refcounts(b"\x01", 0).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert decode_refcounts(b"\x81", 1).tolist() == [1, 0, 0, 2]
    assert decode_refcounts(b"\x2f", 2).tolist() == [15, 2]
    assert decode_refcounts(b"\x01\x02", 4).tolist() == [0x0102]


def fixed(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(fields)


HEADER_FIELDS = fixed(
    version=U32, backing_file_offset=U64, backing_file_size=U32, cluster_bits=U32, size=U64,
    crypt_method=U32, l1_size=U32, l1_table_offset=U64, refcount_table_offset=U64,
    refcount_table_clusters=U32, nb_snapshots=U32, snapshots_offset=U64,
)  # fmt: skip
# The other 64-bit entries are proven word by word in test_entries.
ROUND_TRIPS = {
    "HEADER_V2": HEADER_FIELDS,
    "HEADER_V3_TAIL": fixed(
        incompatible=U64, compatible=U64, autoclear=U64, refcount_order=U32,
        header_length=U32, compression_type=st.integers(0, 255),
        padding=st.binary(min_size=7, max_size=7),
    ),
    "FEATURE_NAME": fixed(
        type=st.integers(0, 255), bit=st.integers(0, 255),
        name=st.binary(min_size=46, max_size=46),
    ),
    "LUKS_POINTER": fixed(offset=U64, length=U64),
    "BITMAPS_EXTENSION": fixed(
        nb_bitmaps=U32, reserved=U32, directory_size=U64, directory_offset=U64
    ),
    "EXTENSION": st.builds(
        lambda kind, data: {"type": kind, "length": len(data), "data": data},
        U32, st.binary(max_size=40),
    ),
    "SNAPSHOT_ENTRY": st.builds(
        lambda head, extra, id_, name: head
        | {"id_size": len(id_), "name_size": len(name), "extra_size": len(extra)}
        | {"extra": extra, "id": id_, "name": name},
        fixed(l1_table_offset=U64, l1_size=U32, date_sec=U32, date_nsec=U32,
              vm_clock_nsec=U64, vm_state_size=U32),
        st.binary(max_size=40), st.binary(max_size=20), st.binary(max_size=20),
    ),
    "BITMAP_ENTRY": st.builds(
        lambda head, extra, name: head
        | {"name_size": len(name), "extra_size": len(extra), "extra": extra, "name": name},
        fixed(
            table_offset=U64, table_size=U32, type=st.integers(0, 255),
            granularity_bits=st.integers(0, 255),
            flags=fixed(reserved=st.integers(0, 2**29 - 1), extra_data_compatible=st.booleans(),
                        auto=st.booleans(), in_use=st.booleans()),
        ),
        st.binary(max_size=20), st.binary(max_size=20),
    ),
}  # fmt: skip


def plain(value: Any) -> Any:
    """A construct container as a dict, its bookkeeping left out."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("_io", "magic")}
    return list(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", ROUND_TRIPS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_structures_round_trip(name: str, data: st.DataObject) -> None:
    fields = data.draw(ROUND_TRIPS[name])
    declared = getattr(structures, name)
    raw = declared.build(fields)
    assert len(raw) % 8 == 0
    assert plain(declared.parse(raw)) == fields


@given(raw=st.binary(min_size=64, max_size=64), length=st.integers(0, 40))
@settings(deadline=None)
def test_heads_are_those_declared(raw: bytes, length: int) -> None:
    head = plain(structures.SNAPSHOT_ENTRY_HEAD.parse(raw[:40]))
    assert SnapshotHead.parse(raw[:40])._asdict() == head
    extra = structures.SNAPSHOT_EXTRA.parse(raw[:length].ljust(24, b"\0"))
    assert snapshot_extra(raw[:length]) == (extra.vm_state_size, extra.disk_size, extra.icount)
    found = BitmapHead.parse(raw[:24])
    declared = plain(structures.BITMAP_ENTRY_HEAD.parse(raw[:24]))
    flags = declared.pop("flags")
    assert found._asdict() == declared | {"flags": found.flags}
    assert (found.in_use, found.auto, found.extra_data_compatible, found.reserved) == (
        flags["in_use"], flags["auto"], flags["extra_data_compatible"], flags["reserved"] << 3
    )  # fmt: skip


@given(raw=st.binary(min_size=72, max_size=72))
@settings(deadline=None)
def test_headers_and_extensions_are_those_declared(raw: bytes) -> None:
    start = structures.MAGIC + raw[4:]
    assert HeaderV2.parse(start)._asdict() == plain(structures.HEADER_V2.parse(start))
    tail = plain(structures.HEADER_V3_TAIL.parse(raw[:40]))
    del tail["padding"]
    assert HeaderTail.parse(raw[:40])._asdict() == tail
    assert extension_head(raw[:8]) == tuple(
        plain(structures.EXTENSION_HEAD.parse(raw[:8])).values()
    )
    name = plain(structures.FEATURE_NAME.parse(raw[:48]))
    assert feature_name(raw[:48]) == tuple(name.values())
    assert LuksPointer.parse(raw[:16])._asdict() == plain(structures.LUKS_POINTER.parse(raw[:16]))
    bitmaps = plain(structures.BITMAPS_EXTENSION.parse(raw[:24]))
    assert BitmapsExtension.parse(raw[:24])._asdict() == bitmaps


@given(words=st.binary(min_size=8, max_size=8))
@settings(deadline=None)
def test_entries_round_trip(words: bytes) -> None:
    """Any 64 bits come back: no bit is left out, none counted twice."""
    for declared in (
        structures.L1_ENTRY,
        structures.REFCOUNT_TABLE_ENTRY,
        structures.BITMAP_TABLE_ENTRY,
        structures.SUBCLUSTER_BITMAP,
        structures.l2_entry(9),
        structures.l2_entry(21),
    ):
        assert declared.build(declared.parse(words)) == words


def test_masks_by_hand() -> None:
    """The specification's bit numbers, literally."""
    entry = structures.L1_ENTRY.parse((1 << 63 | 0x00FFFFFFFFFFFE00).to_bytes(8, "big"))
    assert (entry.copied, entry.offset) == (True, 0x00FFFFFFFFFFFE00)
    assert (entry.reserved_high, entry.reserved_low) == (0, 0)
    entry = structures.l2_entry(16).parse((1 << 62 | 1 << 54 | 0x1234).to_bytes(8, "big"))
    # 64K clusters: x = 54, so bit 54 is the lowest of the sector count.
    assert entry.compressed
    assert (entry.body.additional_sectors, entry.body.offset) == (1, 0x1234)
    assert entry.body.size == 1024 - 0x34
    bitmap = structures.SUBCLUSTER_BITMAP.parse((1 << 32 | 1 << 63 | 2).to_bytes(8, "big"))
    assert [i for i in range(32) if bitmap.zero[i]] == [0, 31]
    assert [i for i in range(32) if bitmap.allocated[i]] == [1]
