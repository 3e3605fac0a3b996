"""`qchain extract`: the raw content, judged by the shadow model and by qemu-img convert."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from cli_runner import COMMAND, Result, command, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.build import build_chain
from fixtures.generate import chains
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_img, raw_of, run_tool
from fixtures.shadow import shadow_points

K = 1 << 10
M = 1 << 20


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(chains(max_layers=3), st.data())
def test_random_chains_and_ranges(specs: list[LayerSpec], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        built = build_chain(Path(scratch), specs)
        for index, point in enumerate(shadow_points(built.specs)):
            arguments = ("extract", "-f", built.formats[index], built.paths[index], "-o")
            out = Path(scratch) / f"whole{index}"
            assert run(*arguments, out).code == 0
            assert out.read_bytes() == point
            assert out.read_bytes() == raw_of(built.paths[index], built.formats[index])
            start = data.draw(st.integers(0, len(point)))
            length = data.draw(st.integers(0, len(point) - start))
            part = Path(scratch) / f"part{index}"
            result = run(*arguments, part, "--range", f"{start}:{length}", "--json")
            assert part.read_bytes() == point[start : start + length]
            assert result.json == {"output": str(part), "start": start, "length": length}


def test_sparse_where_zero(tmp_path: Path) -> None:
    # Zero clusters, unallocated ones and zero bytes that are stored as data.
    built = build_chain(tmp_path, ["64k:A 8M:- 8M:. 4M:0 64k:B"])
    out = tmp_path / "out"
    assert run("extract", built.active, "-o", out).code == 0
    assert out.read_bytes() == shadow_points(built.specs)[0]
    assert out.stat().st_blocks * 512 <= 256 * K


def test_into_a_pipe(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["64k:A 3M:- 64k:B", "32k:C"])
    out = tmp_path / "piped"
    shell = f"{COMMAND} extract {built.active} -o - > {out}"
    run_tool(["sh", "-c", shell])
    assert out.read_bytes() == shadow_points(built.specs)[-1]
    run_tool(["sh", "-c", f"{COMMAND} extract {built.active} -o - --range 16k:32k > {out}"])
    assert out.read_bytes() == shadow_points(built.specs)[-1][16 * K : 48 * K]
    # Whoever reads only the beginning is no error of ours to talk about.
    done = run_tool(["sh", "-c", f"{COMMAND} extract {built.active} -o - | head -c 5"])
    assert len(done.stdout) == 5 and done.stderr == ""


@pytest.mark.parametrize(
    ("text", "span"), [("1M:64k", (M, 64 * K)), ("1m:0", (M, 0)), ("512:1K", (512, K))]
)
def test_suffixes(tmp_path: Path, text: str, span: tuple[int, int]) -> None:
    built = build_chain(tmp_path, ["1M:A 1M:B"])
    out = tmp_path / "out"
    assert run("extract", built.active, "-o", out, "--range", text).code == 0
    assert out.read_bytes() == shadow_points(built.specs)[0][span[0] : sum(span)]


@pytest.mark.parametrize("text", ["", "5", ":", "1:", "-1:5", "1x:2", "1M:1M", "²:1", "0:9999999G"])
def test_impossible_ranges(tmp_path: Path, text: str) -> None:
    built = build_chain(tmp_path, ["1M:A"])
    out = tmp_path / "out"
    run("extract", built.active, "-o", out, f"--range={text}").fails(2)
    assert not out.exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["64k:A", "64k:B"])
    before = built.base.read_bytes()
    run("extract", built.active, "-o", built.base).fails(3)
    assert built.base.read_bytes() == before
    run("extract", built.active, "-o", tmp_path / "no" / "such").fails(2)


def test_nothing_stays_when_it_fails(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["[cluster=64k] 64k:a 64k:b"])
    image = bytearray(built.active.read_bytes())
    # The compressed data follow the metadata; without their end they cannot be read.
    with built.active.open("r+b") as stream:
        stream.seek(5 * 64 * K)
        stream.write(bytes([0xFF]) * (len(image) - 5 * 64 * K))
    out = tmp_path / "out"
    run("extract", built.active, "-o", out).fails(4)
    assert not out.exists()


def test_json_needs_a_file(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["64k:A"])
    command("extract", built.active, "-o", "-", "--json").fails(2)


LIMIT = 200_000


def limited(*arguments: str | Path, limit: int = LIMIT, **environment: str) -> Result:
    """The command where no file may grow beyond `limit` bytes, as on a disk that gets full."""
    done = subprocess.run(
        ["prlimit", f"--fsize={limit}", "--", COMMAND, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_a_full_disk(tmp_path: Path) -> None:
    """Failed midway (5), whatever was to be written; no half of it stays, the source is whole."""
    built = build_chain(tmp_path, ["1M:A 1M:B", "64k:C"])
    with built.active.open("ab") as stream:
        stream.write(b"something left behind " * 20_000)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = tmp_path / "out"
    for words, limit in (
        (("extract", built.active, "-o", out), LIMIT),
        # No write comes near to this limit, but the file's size does.
        (("extract", built.active, "-o", out, "--range", "1M:64k"), 65_535),
        (("leaks", built.active, "--extract", tmp_path), LIMIT),
        (("seal", built.active, "-o", out), 500),
        (("report", built.active, "-o", out), 5000),
    ):
        line = limited(*words, limit=limit).fails(5)
        assert "cannot be written: file too large; make room" in line
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before, words
    result = limited("diff", "--files", "--json", *built.paths, TMPDIR=str(tmp_path))
    assert "file too large" in json.loads(result.out)["files"]["reason"]
    assert "TMPDIR" in result.fails(1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_pipe_that_takes_no_more(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["1M:A"])
    for words in (["extract", built.active, "-o", "-"], ["info", built.active]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        line = Result(done.returncode, "", done.stderr).fails(5)
        assert "output: cannot be written: no space left on device" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_stays_when_it_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    """In the midst of it, as the progress says; then the file is gone."""
    raw, image, out = tmp_path / "raw", tmp_path / "image.qcow2", tmp_path / "out"
    with raw.open("wb") as stream:
        for at in range(128):
            stream.write(bytes([at + 1]) * M)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, image)
    raw.unlink()
    words = [COMMAND, "extract", "--progress", "json", image, "-o", out]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            event = json.loads(line)
            if event["done"]:
                break
        assert event["done"] < event["total"] and out.exists()
        process.send_signal(number)
        rest = process.stderr.read().splitlines()
    assert process.returncode == 130 and rest[-1] == "qchain: interrupted: nothing was changed"
    assert [path.name for path in tmp_path.iterdir()] == [image.name]
