"""docs/forensics.md: what it shows is what the commands say, on evidence that is built anew."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from fixtures.evidence import HOME, Evidence, build_evidence
from fixtures.examination import DOCUMENT, Session, examine
from fixtures.oracle import qemu_check, qemu_img, qemu_info


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("case")


@pytest.fixture(scope="module")
def sessions(case: Path) -> list[Session]:
    return list(examine(DOCUMENT.read_text(), case))


def masked(text: str) -> str:
    """Without what differs from day to day and from one filesystem to another."""
    text = re.sub(r"20\d\d-\d\d-\d\dT[0-9:]+Z", "TIME", text)
    text = re.sub(r"qchain \d[0-9.a-z]*", "qchain VERSION", text)
    # What files take on the disk; the table is as wide as they are.
    text = re.sub(r"[0-9.]+ [KM]iB on disk", "SIZE on disk", text)
    text = re.sub(r"(?m)^disk size .*$", "disk size", text)
    text = re.sub(r"(?m)^(\d  \S+ +qcow2 +48.0 MiB) +[0-9.]+ [KM]iB", r"\1 SIZE", text)
    return re.sub(r" +", " ", text)


def test_the_document_shows_what_the_commands_say(sessions: list[Session]) -> None:
    assert len(sessions) > 10
    for session in sessions:
        assert masked(session.now) == masked(session.written)


def test_a_lie_would_be_noticed(sessions: list[Session]) -> None:
    (said,) = [each for each in sessions if "server.qcow2  changed" in each.written]
    assert masked(said.written.replace("server.qcow2  changed", "x")) != masked(said.now)


def test_what_was_hidden_was_found(case: Path, sessions: list[Session], tmp_path: Path) -> None:
    """By the recipe's own knowledge, and by qemu-img of what it read from the same files."""
    evidence = build_evidence(tmp_path / "again")
    lost = {path.name.split("-")[0]: path.read_bytes() for path in (case / "work/lost").iterdir()}
    assert lost["leaked"].startswith(evidence.history)
    assert lost["slack"] == evidence.archive
    assert evidence.letter[:1024] in lost["free"] and evidence.picture[:1024] in lost["free"]
    assert (case / "work/scan.png").read_bytes() == evidence.picture
    with zipfile.ZipFile(case / "work/lost" / _name(case, "slack")) as archive:
        assert archive.namelist() == ["customers.csv"]
    # The guest sees none of it: it is not in what qemu-img reads.
    raw = (case / "work/judge.raw").read_bytes()
    for hidden in (evidence.history, evidence.archive, evidence.letter, evidence.picture):
        assert hidden[:500] not in raw
    digest = hashlib.sha256(raw).hexdigest()
    assert sum(digest in session.now for session in sessions) >= 2


def _name(case: Path, kind: str) -> str:
    (found,) = [path.name for path in (case / "work/lost").iterdir() if path.name.startswith(kind)]
    return found


def test_the_evidence_is_as_it_was(case: Path, sessions: list[Session]) -> None:
    assert sessions
    for path in (case / "seized").iterdir():
        copy = case / "evidence" / path.name
        assert copy.read_bytes() == path.read_bytes()
        assert copy.stat().st_mtime_ns == path.stat().st_mtime_ns


def test_the_recipe(tmp_path: Path) -> None:
    """The same bytes each time; qemu finds leaks, and nothing else wrong."""
    one, two = build_evidence(tmp_path / "one"), build_evidence(tmp_path / "two")
    assert [p.read_bytes() for p in one.paths] == [p.read_bytes() for p in two.paths]
    names = [qemu_info_alone(path) for path in one.paths]
    assert names == [None, f"{HOME}/server.qcow2", f"{HOME}/mon.qcow2"]
    for path in one.paths:
        alone = path.with_name("alone.qcow2")
        alone.write_bytes(path.read_bytes())
        if path != one.paths[0]:
            qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", alone)
        leaks = 1 if path == one.active else 0
        assert qemu_check(alone) == {"corruptions": 0, "leaks": leaks}
    for part, start in (("2", 10), ("1", 1)):
        assert in_order(one, start << 20), f"e2fsck complains of partition {part}"


def qemu_info_alone(path: Path) -> object:
    return qemu_info(path).get("backing-filename")


def in_order(evidence: Evidence, offset: int) -> bool:
    server, mon, tue = (os.fspath(path) for path in evidence.paths)
    raw = evidence.active.with_name("disk.raw")
    options = (
        f"driver=qcow2,file.filename={tue},backing.driver=qcow2,backing.file.filename={mon},"
        f"backing.backing.driver=qcow2,backing.backing.file.filename={server}"
    )
    qemu_img("convert", "-O", "raw", "--image-opts", options, raw)
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    words = ["e2fsck", "-f", "-n", f"{raw}?offset={offset}"]
    done = subprocess.run(
        words, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    return done.returncode == 0
