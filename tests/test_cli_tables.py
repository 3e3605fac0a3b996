"""Tables for people: whole names where no terminal is, no more than its columns where one is."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from cli_runner import command, on_terminal
from qchain_cli.tables import shortened

from fixtures.build import build_chain
from fixtures.oracle import qemu_img, qemu_info

LONG = "the disk of the accounting server before the update of the twenty-third of november"
NAMES = tuple(f"{LONG} {number}.qcow2" for number in range(3))


def evidence(directory: Path) -> Path:
    """A chain of long names with something to say for every command; its active image."""
    built = build_chain(directory, ["1M:A", "256k:B 256k:-", "64k:C"], NAMES)
    for path in (built.paths[1], built.active):  # slack, and refcounts that lie
        with path.open("r+b") as stream:
            stream.truncate(-(-path.stat().st_size // 65536) * 65536)
            stream.seek(0, 2)
            stream.write(b"left behind " * 20)
    snapshot = ["qemu-img", "snapshot", "-c", LONG.replace(" ", "_"), built.base]
    subprocess.run(snapshot, check=True)
    return built.active


def commands(active: Path) -> dict[str, tuple[list[str | Path], int, tuple[str, ...]]]:
    """Words, exit code, and the names that must be whole."""
    base = active.with_name(NAMES[0])
    middle = active.with_name(NAMES[1])
    seal = active.with_name("seal")
    return {
        "info": (["info", active], 0, (str(active), NAMES[1])),
        "snapshots": (["info", base], 0, (LONG.replace(" ", "_"),)),
        "chain": (["chain", active], 0, NAMES),
        "tree": (["tree", active.parent], 0, tuple(str(active.with_name(n)) for n in NAMES)),
        "plan": (["plan", "--drop", NAMES[1], active], 0, (" -> ".join(reversed(NAMES)),)),
        "leaks": (["leaks", active, "--extract", active.with_name("out")], 0, ("out/slack-",)),
        "diff": (["diff", middle, active], 1, (f"{NAMES[1]} -> {NAMES[2]}",)),
        "check": (["check", active.parent / "sub" / "damaged"], 1, ("refcount",)),
        "verify": (["verify", "--seal", seal, middle], 1, NAMES),
    }


@pytest.mark.parametrize("which", commands(Path("x")))
def test_names_are_whole_in_a_pipe_and_lines_fit_a_terminal(tmp_path: Path, which: str) -> None:
    active = evidence(tmp_path)
    assert command("seal", active, "-o", active.with_name("seal")).code == 0
    damaged = active.parent / "sub" / "damaged"
    damaged.parent.mkdir()
    damaged.write_bytes(active.read_bytes())
    with damaged.open("r+b") as stream:  # the first refcount block of 64 KiB clusters
        stream.seek(2 * 65536)
        stream.write(bytes(8))
    words, code, names = commands(active)[which]
    piped = command(*words)
    assert piped.code == code, piped.err
    lines = piped.out.splitlines()
    for name in names:
        assert any(name in line for line in lines), name
    assert not any(line.endswith(" ") for line in lines)
    if "--extract" in words:
        words = words[:-2]
    shown = on_terminal(*words)
    assert shown.code == code
    assert max(map(len, shown.out.splitlines())) <= 80, shown.out
    assert max(map(len, on_terminal(*words, columns=120).out.splitlines())) <= 120
    if which not in TABLES:
        assert "…" not in shown.out  # broken, not cut
    else:
        narrow = on_terminal(*words, columns=50).out.splitlines()
        assert max(map(len, narrow)) <= 50, narrow


TABLES = ("chain", "plan", "verify", "leaks")
"""Names are whole above the table of a plan."""


def test_the_ends_of_names_are_kept(tmp_path: Path) -> None:
    """They tell the images apart; the figures are all there, however narrow the terminal is."""
    active = evidence(tmp_path)
    for columns in (80, 50):
        text = on_terminal("chain", active, columns=columns).out
        lines = text.splitlines()
        for number in range(3):
            assert any(f"{number}.qcow2" in line and "…" in line for line in lines), text
        assert "64.0 KiB" in text and ("shadowed 64.0 KiB" in text) == (columns == 50)
    text = " ".join(on_terminal("plan", "--drop", NAMES[1], active, columns=50).out.split())
    for head in ("reads", "writes", "grows", "frees", "time", "at risk nothing"):
        assert head in text
    assert re.search(r"\* +(pull|commit) +the disk o\S* ?.*…\S*.* [12]\.qcow2 reads", text), text


@pytest.mark.parametrize("room", range(3, 90))
def test_a_shortened_name_fits(room: int) -> None:
    found = shortened(NAMES[0], room)
    assert len(found) == min(room, len(NAMES[0])) and found[-1] == NAMES[0][-1]
    assert room < 10 or found.endswith("0.qcow2")


HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred",
    "line\nqchain: forged: yes",
    "back\rward\x08\x7f\x9b1m",
    "[bold]markup[red] :smile: {x}",
)


def test_hostile_names_are_harmless_everywhere(tmp_path: Path) -> None:
    """In names of files, snapshots, bitmaps and backing files; to a terminal and to HTML."""
    layers = ["1M:A", "256k:B 256k:-", "64k:C", "[datafile] 64k:- 64k:D"]
    names = [f"{name}.qcow2" for name in HOSTILE]
    built = build_chain(tmp_path / "\x1b[41m", layers, names, "absolute")
    base, middle, active = built.base, built.paths[2], built.active
    for name in HOSTILE:
        qemu_img("snapshot", "-c", name, base)
        qemu_img("bitmap", "--add", "-f", "qcow2", base, name)
    assert [each["name"] for each in qemu_info(base)["snapshots"]] == list(HOSTILE)
    for path in (base, active):
        with path.open("r+b") as stream:
            stream.seek(0, 2)
            stream.write(b"\x1b[31m <script> left behind ".ljust(65536, b"!"))
    seal, page = tmp_path / "seal", tmp_path / "report.html"
    where = active.parent
    commands: list[list[str | Path]] = [
        *(["info", path] for path in built.paths),
        *(["chain", active], ["tree", where], ["map", active], ["hash", active]),
        *(["check", base], ["leaks", base], ["leaks", "--extract", where / "out", active]),
        *(["compare", middle, active], ["diff", middle, active]),
        *(["seal", active, "-o", seal], ["verify", "--seal", seal, middle]),
        *(["report", active, "-o", page], ["extract", active, "-o", where / "raw"]),
        *(["map", "--snapshot", HOSTILE[1], base], ["plan", "--drop", built.paths[1], middle]),
    ]
    failing: list[list[str | Path]] = [  # what backs on it, no such snapshot, no such file
        ["plan", "--flatten", middle],
        *(["hash", "--snapshot", "none", base], ["hash", where / "\x1b[2Jnothing"]),
    ]
    for words in commands + failing:
        result = command(*words)
        assert (result.code in (0, 1)) == (words in commands), (words, result.err)
        for text in (result.out, result.err):
            for line in text.splitlines():
                assert line.isprintable(), (words, line)
                assert not line.startswith("qchain: forged"), words
            assert "\x0b" not in text and "\r" not in text
        if words[0] in ("info", "chain", "tree", "check", "map", "compare", "diff", "verify"):
            shown = on_terminal(*words)
            assert all(line.isprintable() for line in shown.out.splitlines()), words
            document = command(*words, "--json").out
            assert document.isascii() and json.loads(document) is not None
    # Markup is text.
    assert "[bold]markup[red] :smile: {x}" in command("chain", active).out
    assert b"\x1b" not in page.read_bytes() and b"<script" not in page.read_bytes()
