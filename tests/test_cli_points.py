"""Which point is read: internal snapshots, evidence from elsewhere, missing bases, LUKS."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from cli_runner import command, run
from test_cli_map import as_qemu, mapped
from test_luks import SECRET, create, judged, write

from fixtures.build import build_chain
from fixtures.oracle import qemu_compare, qemu_img, qemu_io, qemu_map, raw_of

K = 1 << 10


def with_snapshot(directory: Path) -> Path:
    """An overlay whose snapshot 'before' differs from what it holds now."""
    path = build_chain(directory, ["64k:A 64k:B 128k:-", "64k:- 64k:C 128k:-"]).active
    qemu_img("snapshot", "-c", "before", path)
    qemu_io(path, ["write -q -P 7 0 64k", "write -q -P 8 128k 32k"], "qcow2")
    return path


def snapshot_raw(path: Path) -> Path:
    raw = path.parent / "snapshot.raw"
    options = f"driver=qcow2,file.filename={path}"
    qemu_img("convert", "-l", "snapshot.name=before", "-O", "raw", "--image-opts", options, raw)
    return raw


@pytest.mark.parametrize("name", ["before", "1"])
def test_a_snapshot_is_hashed_and_extracted(tmp_path: Path, name: str) -> None:
    path = with_snapshot(tmp_path)
    judge = snapshot_raw(path).read_bytes()
    assert judge != raw_of(path)
    found = run("hash", "--json", "--snapshot", name, path).json
    assert found["digest"] == hashlib.sha256(judge).hexdigest()
    assert run("extract", "--snapshot", name, "-o", tmp_path / "out", path).code == 0
    assert (tmp_path / "out").read_bytes() == judge


def test_a_snapshot_is_mapped(tmp_path: Path) -> None:
    path = with_snapshot(tmp_path)
    found = mapped("--snapshot", "before", path)
    alone = mapped("--layer", "--snapshot", "before", path)
    assert mapped(path) == as_qemu(qemu_map(path)) != found
    # Where the data lies is the same after the image has gone back to its snapshot.
    qemu_img("snapshot", "-a", "before", path)
    assert found == as_qemu(qemu_map(path))
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", path)
    assert alone == as_qemu(qemu_map(path)) != found


def test_snapshots_are_compared(tmp_path: Path) -> None:
    path = with_snapshot(tmp_path)
    raw = snapshot_raw(path)
    assert not qemu_compare(path, raw, "qcow2", "raw")
    assert run("compare", path, raw).code == 1
    assert run("compare", "--snapshot", "before", path, raw).code == 0
    assert run("compare", "--snapshot-b", "before", raw, path).code == 0
    assert run("compare", "--snapshot", "before", path, path).code == 1
    assert run("compare", *("--snapshot", "before", "--snapshot-b", "1"), path, path).code == 0
    found = run("diff", "--json", "--snapshot", "before", path, path)
    assert found.code == 1
    ranges = [(each["start"], each["length"]) for each in found.json["ranges"]]
    assert ranges == [(0, 64 * K), (128 * K, 32 * K)]
    assert run("diff", *("--snapshot", "before", "--snapshot-b", "before"), path, path).code == 0


@pytest.mark.parametrize("reader", ["map", "hash"])
def test_no_such_snapshot(tmp_path: Path, reader: str) -> None:
    path = with_snapshot(tmp_path)
    for name in ("after", ""):
        line = run(reader, "--snapshot", name, path).fails(4)
        assert repr(name) in line and "before" in line
    assert "snapshot" in run(reader, "--snapshot", "x", snapshot_raw(path)).fails(4)
    assert "--snapshot" in run("chain", "--snapshot", "before", path).fails(2)


def moved(directory: Path) -> tuple[Path, Path, bytes]:
    """A chain whose base was carried elsewhere: the active image, the directory, the content."""
    chain = build_chain(directory, ["64k:A 64k:B", "64k:- 32k:C 32k:-"])
    content = raw_of(chain.active)
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir()
    shutil.move(chain.base, elsewhere)
    return chain.active, elsewhere, content


def test_a_base_that_was_moved_is_found(tmp_path: Path) -> None:
    path, elsewhere, content = moved(tmp_path)
    line = run("hash", path).fails(4)
    assert "base.qcow2" in line and "--search" in line
    assert run("hash", "--search", tmp_path, path).code == 4
    result = run("hash", "--json", "--search", tmp_path, "--search", elsewhere, path)
    assert result.code == 0 and result.err == ""
    assert result.json["digest"] == hashlib.sha256(content).hexdigest()
    assert "missing" not in result.json
    layers = run("chain", "--json", "--search", elsewhere, path).json["layers"]
    assert [layer["path"] for layer in layers] == [str(path), str(elsewhere / "base.qcow2")]
    assert "none" in run("hash", "--search", tmp_path / "none", path).fails(2)


def test_a_missing_base_is_zeroes_and_that_is_said(tmp_path: Path) -> None:
    path, _, content = moved(tmp_path)
    base = tmp_path / "base.qcow2"
    alone = tmp_path / "alone.qcow2"
    shutil.copy(path, alone)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", alone)
    judge = raw_of(alone)
    assert judge != content
    line = f"qchain: {base}: missing, taken for zeroes (--missing zero)\n"

    result = run("hash", "--json", "--missing", "zero", path)
    assert (result.code, result.err) == (0, line)
    assert result.json["digest"] == hashlib.sha256(judge).hexdigest()
    result = run("map", "--json", "--missing", "zero", path)
    assert (result.code, result.err) == (0, line)
    assert as_qemu(result.json) == as_qemu(qemu_map(alone))
    result = run("extract", "--json", "--missing", "zero", "-o", tmp_path / "out", path)
    assert (result.json["missing"], result.err) == (str(base), line)
    assert (tmp_path / "out").read_bytes() == judge
    result = run("compare", "--json", "--missing", "zero", alone, path)
    assert (result.code, result.err, result.json["missing_b"]) == (0, line, str(base))
    assert "missing" not in result.json
    assert run("compare", "--json", "--missing", "zero", path, alone).json["missing"] == str(base)
    for reader in (["chain"], ["diff", alone], ["seal", "-o", tmp_path / "s"]):
        result = run(*reader, "--json", "--missing", "zero", path)
        assert (result.code, result.err) == (0, line)
        assert str(base) in (result.json.get("missing"), result.json.get("missing_b"))
    result = run("chain", "--missing", "zero", path)
    (row,) = [words for words in map(str.split, result.out.splitlines()) if "missing" in words]
    assert row[:3] == ["1", "base.qcow2", "missing"] and result.err == line


def test_what_is_missing_is_said_in_every_output(tmp_path: Path) -> None:
    """On stdout as well, for that is what is kept; in JSON a field, in a map one per extent."""
    path, _, _ = moved(tmp_path)
    base = tmp_path / "base.qcow2"
    line = f"{base}: missing, taken for zeroes (--missing zero)"
    seal = tmp_path / "seal"
    zero = ("--missing", "zero")
    assert line in run("seal", *zero, "-o", seal, path).out.splitlines()
    for words in (
        *(["map"], ["extract", "-o", tmp_path / "out"], ["compare", path], ["diff", path]),
        *(["verify", "--seal", seal], ["report", "-o", tmp_path / "report.html"]),
    ):
        result = run(*words, *zero, path)
        assert line in result.out.splitlines() and f"qchain: {line}\n" in result.err, words
    # sha256sum reads such a line as a comment.
    digest, comment = run("hash", *zero, path).out.splitlines()
    assert comment == f"# {line}" and digest.endswith(f"  {path}")
    sums = tmp_path / "sums"
    assert run("extract", *zero, "-o", tmp_path / "raw", path).code == 0
    sums.write_text(f"{digest.split()[0]}  {tmp_path / 'raw'}\n{comment}\n")
    subprocess.run(["sha256sum", "--strict", "-c", sums], check=True, capture_output=True)

    extents = run("map", "--json", *zero, path).json
    lost = [(each["start"], each["length"]) for each in extents if each.get("missing")]
    assert lost == [(0, 64 * K), (96 * K, 32 * K)] or lost == [(0, 64 * K)]
    text = run("map", *zero, path).out.splitlines()
    rows = [row.split() for row in text if len(row.split()) == 5]
    assert [(int(r[0]), int(r[1])) for r in rows if r[3] == "missing"] == lost
    for words in (["verify", "--seal", seal], ["report", "--no-digests", "-o", tmp_path / "r2"]):
        assert run(*words, "--json", *zero, path).json["missing"] == str(base)
    for extent in run("map", "--json", path.with_name("elsewhere") / "base.qcow2").json:
        assert "missing" not in extent


def test_missing_from_a_directory_of_another_machine(tmp_path: Path) -> None:
    """Outside of what may be opened, and not there either: missing. If it is there: refused."""
    path, elsewhere, _ = moved(tmp_path / "case")
    gone = tmp_path / "images" / "base.qcow2"
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", gone, "-F", "qcow2", path)
    alone = tmp_path / "case" / "alone.qcow2"
    shutil.copy(path, alone)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", alone)
    assert "--allow" in run("hash", path).fails(4)
    result = run("hash", "--json", "--missing", "zero", path)
    assert result.code == 0 and result.json["missing"] == str(gone)
    assert result.json["digest"] == hashlib.sha256(raw_of(alone)).hexdigest()
    gone.parent.mkdir()
    shutil.copy(elsewhere / "base.qcow2", gone)
    assert "--allow" in run("hash", "--missing", "zero", path).fails(4)
    gone.unlink()
    gone.symlink_to("/etc/shadow.none")
    assert "--allow" in run("hash", "--missing", "zero", path).fails(4)


def test_evidence_under_other_names_of_directories(tmp_path: Path) -> None:
    """Absolute names of another machine: the way on is named, and what was taken for what."""
    chain = build_chain(tmp_path, ["64k:A 64k:B", "64k:- 32k:C 32k:-"])
    path = chain.active
    elsewhere = "/nowhere/images/base.qcow2"
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", elsewhere, "-F", "qcow2", path)
    line = run("hash", path).fails(4)
    assert f"--search {tmp_path}" in line and "--allow /nowhere/images" in line
    found = run("chain", "--json", "--search", tmp_path, path).json
    (text,) = found["relocated"]
    assert elsewhere in text and str(chain.base) in text
    assert text in run("chain", "--search", tmp_path, path).err
    chain.base.rename(tmp_path / "other")
    assert "--search" not in run("hash", path).fails(4)
    (tmp_path / "other").rename(chain.base)

    images = {each["path"]: each for each in run("tree", "--json", tmp_path).json["images"]}
    assert "missing" in images[str(path)]["problems"][0]
    found = run("tree", "--json", "--search", tmp_path, tmp_path).json["images"]
    images = {each["path"]: each for each in found}
    assert images[str(path)]["backing"] == str(chain.base) and not images[str(path)]["problems"]
    assert images[str(chain.base)]["overlays"] == [str(path)]
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", chain.base.name, "-F", "qcow2", path)
    assert run("chain", "--json", "--search", tmp_path, path).json["relocated"] == []


def test_missing_is_for_backing_files_alone(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["64k:A"]).active
    assert run("hash", "--missing", "zero", path).err == ""
    assert "none" in run("hash", "--missing", "zero", tmp_path / "none").fails(4)
    assert "ones" in run("hash", "--missing", "ones", path).fails(2)


@pytest.mark.parametrize(
    "option", ["--search=.", "--snapshot=s", "--snapshot=", "--secret-file=f", "--missing=zero"]
)
def test_a_merge_takes_no_options_of_reading(tmp_path: Path, option: str) -> None:
    chain = build_chain(tmp_path, ["64k:A", "64k:-"])
    before = [path.read_bytes() for path in chain.paths]
    for words in (["plan"], ["merge", "--yes"]):
        line = run(*words, "--flatten", option, chain.active).fails(3)
        assert option.split("=")[0] in line
    assert [path.read_bytes() for path in chain.paths] == before


def test_luks(tmp_path: Path) -> None:
    path = create(tmp_path / "luks.qcow2")
    write(path, [("A", 0, 64 * K), ("B", 128 * K, 100 * K)])
    content = judged(path)
    secret, wrong = tmp_path / "right", tmp_path / "wrong"
    secret.write_bytes(SECRET)
    expected = hashlib.sha256(content).hexdigest()
    assert run("hash", "--json", "--secret-file", secret, path).json["digest"] == expected
    assert "--secret-file" in run("hash", path).fails(4)
    assert run("map", path).code == 0
    wrong.write_bytes(SECRET + b"\n")
    assert "passphrase" in run("hash", "--secret-file", wrong, path).fails(4)
    assert "none" in run("hash", "--secret-file", tmp_path / "none", path).fails(2)
    wrong.write_bytes(bytes((1 << 20) + 1))
    assert "wrong" in run("hash", "--secret-file", wrong, path).fails(2)

    # Both sides of a comparison are opened with one passphrase, though a pipe gives it once.
    os.mkfifo(tmp_path / "pipe")
    giver = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[SECRET], daemon=True)
    giver.start()
    plain = tmp_path / "judge.raw"
    plain.write_bytes(content)
    options = ("--secret-file", tmp_path / "pipe", "-F", "qcow2")
    copy = tmp_path / "copy.qcow2"
    shutil.copy(path, copy)
    assert command("compare", *options, path, copy).code == 0
    giver.join()
    assert run("compare", "--secret-file", secret, path, plain).code == 0

    special = run("info", "--json", path).json
    judge = qemu_img("info", path).stdout
    assert special["encryption"] == "luks"
    luks = special["luks"]
    assert luks["uuid"] in judge and f"ivgen alg: {luks['ivgen']}" in judge
    assert f"cipher alg: {luks['cipher']}" in judge and f"hash alg: {luks['hash']}" in judge
    assert [slot["slot"] for slot in luks["key_slots"]] == [0]
    assert f"iters: {luks['key_slots'][0]['iterations']}" in judge
    text = run("info", path).out
    assert luks["cipher"] in text and "key slots: 0" in text


def test_dirty_ranges_of_a_bitmap(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    qemu_img("bitmap", "--add", "-g", "64k", "-f", "qcow2", path, "nightly")
    qemu_io(path, ["write -q 64k 1k", "write -q 1M 128k"], "qcow2")
    result = run("info", "--json", "--bitmap", "nightly", path)
    assert result.json["dirty"] == [
        {"start": 64 * K, "length": 64 * K},
        {"start": 1024 * K, "length": 128 * K},
    ]
    text = run("info", "--bitmap", "nightly", path).out
    assert "65,536 bytes from 65536" in text and "131,072 bytes from 1048576" in text
    assert "dirty" not in run("info", "--json", path).json
    none = run("info", "--json", "--bitmap", "weekly", path)
    assert "weekly" in none.fails(4) and none.json["virtual_size"] == 8 << 20
    assert "--bitmap" in run("info", "-f", "raw", "--bitmap", "nightly", path).fails(2)
