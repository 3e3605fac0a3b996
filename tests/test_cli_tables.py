"""Tables for people: whole names where no terminal is, no more than its columns where one is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cli_runner import command, on_terminal

from fixtures.build import build_chain

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
    assert "…" not in shown.out  # broken, not cut
