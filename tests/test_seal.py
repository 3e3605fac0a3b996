"""`qchain seal` and `qchain verify`: digests by hashlib and qemu-img; every change is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from cli_runner import Result, run
from test_luks import SECRET, create, write

from fixtures.build import Chain, build_chain
from fixtures.oracle import qemu_img, qemu_io, raw_of
from qchain.chain.chain import open_chain
from qchain.forensics.staleness import GRACE, birth_ns, staleness
from qchain.hostfile import HostFile

HOUR = 3600 * 10**9


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def built(tmp_path: Path) -> Chain:
    return build_chain(tmp_path, ["[raw] 256k:A", "64k:- 64k:B", "128k:- 64k:c"])


def test_what_a_seal_holds(built: Chain) -> None:
    result = run("seal", "--json", built.active)
    assert result.code == 0 and result.err == ""
    where = built.active.with_name("l2.qcow2.seal.json")
    seal = json.loads(where.read_text())
    assert result.json == {"output": str(where), **seal}
    assert seal["point"]["sha256"] == sha256(raw_of(built.active))
    assert seal["tool"].startswith("qchain ")
    for path, entry in zip(reversed(built.paths), seal["layers"], strict=True):
        content = path.read_bytes()
        assert entry["name"] == path.name and entry["size"] == len(content)
        assert entry["sha256"] == sha256(content)
        assert entry["header_sha256"] == sha256(content[:65536])
        assert entry["mtime_ns"] == path.stat().st_mtime_ns
    assert run("verify", built.active, "--seal", where).code == 0
    assert run("verify", "--json", built.active, "--seal", where).json["intact"]
    run("seal", built.active).fails(3)  # it is not written over


def flip(path: Path, at: int) -> None:
    """One bit, all times kept."""
    status = path.stat()
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_one_bit_anywhere_is_noticed(built: Chain, depth: int) -> None:
    seal = built.active.with_name("seal")
    assert run("seal", built.active, "-o", seal).code == 0
    path = built.paths[-1 - depth]
    # In a header, the padding: nothing reads it.
    flip(path, path.stat().st_size - 1 if path.suffix == ".raw" else 110)
    result = run("verify", "--json", built.active, "--seal", seal)
    assert result.code == 1 and result.err == ""
    assert not result.json["intact"]
    assert any(path.name in text for text in result.json["changes"])
    assert all(other.name not in text for text in result.json["changes"]
               for other in built.paths if other != path)  # fmt: skip
    assert result.json["point_same"] == (depth < 2)
    assert "though its time of change is the same" in " ".join(result.json["changes"])


def states(result: Result) -> dict[str, str]:
    assert result.err == ""
    return {layer["name"]: layer["state"] for layer in result.json["layers"]}


def test_another_layout_of_the_same_content(built: Chain) -> None:
    """After a merge the files stand in other places; one that nobody touched is not accused."""
    seal = built.active.with_name("seal")
    run("seal", built.active, "-o", seal)
    qemu_img("rebase", "-f", "qcow2", "-F", "raw", "-b", "base.raw", built.active)
    result = run("verify", "--json", built.active, "--seal", seal)
    assert result.code == 1 and result.json["point_same"]
    assert states(result) == {
        "l2.qcow2": "changed",
        "base.raw": "unchanged",
        "l1.qcow2": "vanished",
    }
    assert not any("base.raw" in text for text in result.json["changes"])
    (text,) = [text for text in result.json["changes"] if "l1.qcow2" in text]
    assert "no more (a file of that name is still there)" in text
    built.paths[1].unlink()
    text = run("verify", built.active, "--seal", seal).out
    assert "the guest still sees" in text and "still there" not in text
    assert [line.split() for line in text.splitlines()[2:6]] == [
        ["image", "state"],
        ["l2.qcow2", "changed"],
        ["base.raw", "unchanged"],
        ["l1.qcow2", "vanished"],
    ]


def test_an_image_under_the_name_of_another(built: Chain) -> None:
    """A merge lets the result take the active name: the file is known by its content."""
    seal = built.active.with_name("seal")
    run("seal", built.active, "-o", seal)
    built.paths[1].replace(built.active)
    result = run("verify", "--json", built.active, "--seal", seal)
    assert result.code == 1 and not result.json["point_same"]
    layers = [(each["name"], each["state"], each["sealed_as"]) for each in result.json["layers"]]
    assert layers == [
        ("l2.qcow2", "unchanged", "l1.qcow2"),
        ("base.raw", "unchanged", "base.raw"),
        ("l2.qcow2", "vanished", "l2.qcow2"),
    ]
    assert "l2.qcow2: was sealed under the name l1.qcow2" in result.json["notes"]


def test_an_overlay_more(built: Chain) -> None:
    seal = built.active.with_name("seal")
    run("seal", built.active, "-o", seal)
    above = built.active.with_name("above.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", built.active.name, "-F", "qcow2", above)
    result = run("verify", "--json", above, "--seal", seal)
    assert result.code == 1 and result.json["point_same"]
    assert set(states(result).items()) == {
        ("above.qcow2", "new"),
        *((path.name, "unchanged") for path in built.paths),
    }


def test_sealed_with_a_missing_base(built: Chain) -> None:
    seal = built.active.with_name("seal")
    away = built.base.with_name("away")
    built.base.rename(away)
    assert run("seal", "--missing", "zero", built.active, "-o", seal).code == 0
    assert json.loads(seal.read_text())["missing"] == str(built.base)
    assert run("verify", "--missing", "zero", built.active, "--seal", seal).code == 0
    away.rename(built.base)
    result = run("verify", "--json", built.active, "--seal", seal)
    assert result.code == 1 and states(result)["base.raw"] == "new"
    assert any("was missing when" in text for text in result.json["notes"])
    seal.unlink()
    run("seal", built.active, "-o", seal)
    built.base.unlink()
    result = run("verify", "--json", "--missing", "zero", built.active, "--seal", seal)
    assert result.code == 1 and result.json["missing"] == str(built.base)
    assert any("missing, taken for zeroes" in text for text in result.json["changes"])


def test_the_guest_sees_another_content(built: Chain) -> None:
    seal = built.active.with_name("seal")
    run("seal", built.active, "-o", seal)
    qemu_io(built.active, ["write -q -P 7 0 512"], "qcow2")
    result = run("verify", "--json", built.active, "--seal", seal)
    assert result.code == 1 and not result.json["point_same"]
    assert "the guest sees another content than was sealed" in result.json["changes"]


def test_copied_evidence_is_intact(built: Chain, tmp_path: Path) -> None:
    seal = built.active.with_name("seal")
    run("seal", built.active, "-o", seal)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in built.paths:
        shutil.copyfile(path, copy / path.name)  # the times are not kept
        os.utime(copy / path.name, ns=(HOUR, HOUR))
    result = run("verify", "--json", copy / "l2.qcow2", "--seal", seal)
    assert result.code == 0 and result.json["intact"] and len(result.json["notes"]) == 3


def test_a_data_file_is_sealed(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["[datafile] 64k:A 64k:-"])
    seal = tmp_path / "seal"
    assert run("seal", built.active, "-o", seal).code == 0
    flip(built.active.with_name(built.active.name + ".data"), 100)
    result = run("verify", "--json", built.active, "--seal", seal)
    assert result.code == 1 and not result.json["point_same"]
    assert any("base.qcow2.data" in text for text in result.json["changes"])


NEARLY = '{"seal": 1, "sealed": "x", "point": {"sha256": "y"}, "layers": [{}]}'

SEALED = '"name": "n", "size": 1, "mtime_ns": 1, "header_sha256": "h", "sha256": "s"'
ODD = (  # values that cannot be
    NEARLY.replace("{}", "{" + SEALED + ', "path": [1]}'),
    NEARLY.replace("{}", "{" + SEALED + ', "data_file": 5}'),
    NEARLY.replace("{}", "{" + SEALED + "}").replace("]}", '], "missing": []}'),
    NEARLY.replace("[{}]", '{"a": {}}'),
)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"seal": 1}', "\xff", NEARLY, *ODD])
def test_no_seal(built: Chain, text: str) -> None:
    seal = built.active.with_name("seal")
    seal.write_bytes(text.encode("latin-1"))
    run("verify", built.active, "--seal", seal).fails(2)
    run("verify", built.active, "--seal", seal.with_name("none")).fails(4)


def test_without_the_passphrase_the_files_are_sealed(tmp_path: Path) -> None:
    path = create(tmp_path / "luks.qcow2")
    write(path, [("A", 0, 65536)])
    seal, known = tmp_path / "seal", tmp_path / "known"
    result = run("seal", "--json", path, "-o", seal)
    assert result.code == 0 and "passphrase" in result.err and result.err.count("\n") == 1
    manifest = json.loads(seal.read_text())
    assert manifest["point"]["sha256"] is None and "passphrase" in manifest["unreadable"]
    assert manifest["layers"][0]["sha256"] == sha256(path.read_bytes())
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    with_secret = ("--secret-file", secret)
    assert run("seal", *with_secret, path, "-o", known).code == 0
    for arguments in ((seal,), (known,), (seal, *with_secret), (known, *with_secret)):
        result = run("verify", "--json", path, "--seal", *arguments)
        assert result.code == 0 and result.json["intact"], result.out
        both = arguments == (known, *with_secret)
        assert result.json["point_same"] == both
        assert bool(result.json["notes"]) != both
    flip(path, path.stat().st_size - 100)
    result = run("verify", "--json", path, "--seal", seal)
    assert result.code == 1 and states(result) == {"luks.qcow2": "changed"}


# Signs that a base was changed after its overlay was made


def signs(chain: Chain) -> list[str]:
    with open_chain(chain.active) as opened:
        return staleness(opened.layers)


def set_mtime(path: Path, nanoseconds: int) -> None:
    os.utime(path, ns=(nanoseconds, nanoseconds))


def test_a_base_written_after_its_overlay_was_made(built: Chain) -> None:
    assert signs(built) == []
    made = built.paths[1].stat().st_mtime_ns
    # An overlay in use is newer than its base; only its birth tells that the base is too new.
    set_mtime(built.base, made + 2 * HOUR)
    set_mtime(built.paths[1], made + 3 * HOUR)
    set_mtime(built.active, made + 4 * HOUR)
    with HostFile(built.paths[1]) as file:
        assert birth_ns(file) is not None, "this filesystem keeps no birth times"
        assert birth_ns(file) == birth_ns(built.paths[1])
    found = signs(built)
    assert len(found) == 2 and "l1.qcow2: its backing file base.raw was written" in found[1]


def test_a_base_newer_than_the_last_write_of_its_overlay(built: Chain) -> None:
    old = built.base.stat().st_mtime_ns - 100 * HOUR
    for path in built.paths:  # copied with their times: births say nothing
        set_mtime(path, old)
    assert signs(built) == []
    set_mtime(built.base, old + GRACE)
    assert signs(built) == []  # a live snapshot flushes the base a moment later
    set_mtime(built.base, old + GRACE + 1)
    assert len(signs(built)) == 1


def test_a_base_that_grew(built: Chain) -> None:
    qemu_img("resize", "-q", "-f", "raw", built.base, "1M")
    found = signs(built)
    assert len(found) == 1 and "longer" in found[0]


def test_a_seal_beside_the_images_is_a_witness(built: Chain) -> None:
    """Times may lie; a seal that lies there tells of sizes, headers and times."""
    assert run("seal", built.paths[1]).code == 0
    assert signs(built) == []
    content = built.base.read_bytes()
    status = built.base.stat()
    flip(built.base, 100)  # all times kept
    (text,) = signs(built)
    assert text.startswith("base.raw: has other first 64 KiB than was sealed (l1.qcow2.seal.json")
    assert text in run("chain", "--json", built.active).json["warnings"]
    assert text in run("chain", built.active).err
    built.base.write_bytes(content + bytes(512))
    os.utime(built.base, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert any("262656 bytes long, not 262144 as was sealed" in text for text in signs(built))
    built.base.write_bytes(content)
    set_mtime(built.base, status.st_mtime_ns)
    assert signs(built) == []
    set_mtime(built.base, status.st_mtime_ns + GRACE + 1)
    assert any("later than the file that was sealed" in text for text in signs(built))
    # Anybody can put a file there: what is none says nothing.
    built.paths[1].with_name("l1.qcow2.seal.json").write_text("{}")
    assert not any("sealed" in text for text in signs(built))
    built.active.with_name("l2.qcow2.seal.json").mkdir()
    assert not any("sealed" in text for text in signs(built))
