"""Running qemu-img: what is said to it, what is heard of it, how it is ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qchain.errors import ExitCode, ImageError
from qchain.plan.commands import (
    commit_argv,
    create_empty_argv,
    image_opts,
    rebase_safe_argv,
    rebase_unsafe_argv,
    rebase_writethrough_argv,
    resize_shrink_argv,
    safe_name,
)
from qchain.run.qemu_img import QemuImg, QemuImgError

M = 1024 * 1024

needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="needs qemu-img, qemu-io"
)

# In place of qemu-img: does what the test says and writes down what it was given.
FAKE = f"""#!{sys.executable}
import json, os, resource, signal, sys, time
from pathlib import Path
here = Path(__file__).parent
report = {{
    "argv": sys.argv[1:],
    "cwd": os.getcwd(),
    "locale": os.environ["LC_ALL"],
    "group": os.getpgrp() == os.getpid(),
    "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "stdin": sys.stdin.read(),
    "pid": os.getpid(),
}}
(here / "report.new").write_text(json.dumps(report))
(here / "report.new").rename(here / "report")
exec((here / "script").read_text())
"""


@pytest.fixture
def fake(tmp_path: Path) -> QemuImg:
    program = tmp_path / "qemu-img"
    program.write_text(FAKE)
    program.chmod(0o755)
    (tmp_path / "script").write_text("")
    return QemuImg(program)


def script(directory: Path, text: str) -> None:
    (directory / "script").write_text(textwrap.dedent(text))


def report(directory: Path) -> dict[str, object]:
    return json.loads((directory / "report").read_text())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a", "a"),
        ("-a", "./-a"),
        ("a:b", "./a:b"),
        ("json:{}", "./json:{}"),
        ("/a:b", "/a:b"),
        ("d/a:b", "d/a:b"),
        ("../-a", "../-a"),
    ],
)
def test_safe_name(name: str, said: str) -> None:
    assert safe_name(name) == said


def test_command_lines() -> None:
    assert commit_argv("/d/base", "/d/top") == [
        *("commit", "-p", "-d", "-f", "qcow2", "-b", "/d/base", "/d/top")
    ]
    assert rebase_unsafe_argv("-t", "qcow2", "-b", "raw") == [
        # An option's value needs no './', and a header must get the name as it is.
        *("rebase", "-u", "-f", "qcow2", "-b", "-b", "-F", "raw", "./-t")
    ]
    assert rebase_unsafe_argv("t", "qcow2", None) == ["rebase", "-u", "-f", "qcow2", "-b", "", "t"]
    assert rebase_writethrough_argv("t", "qcow2", "a:b", "qcow2") == [
        *("rebase", "-p", "-t", "writethrough", "--image-opts", "-b", "./a:b", "-F", "qcow2"),
        "driver=qcow2,file.filename=t,lazy-refcounts=off",
    ]
    assert resize_shrink_argv("t", "raw", 512) == [
        *("resize", "-q", "--shrink", "-f", "raw", "t", "512")
    ]
    assert rebase_safe_argv("/d/w/image", "alias", "a,b", "raw")[-1].endswith(
        "backing.driver=raw,backing.file.filename=a,,b"
    )
    with pytest.raises(ValueError, match="never probed"):
        rebase_unsafe_argv("t", "qcow2", "b")


@needs_qemu
@pytest.mark.parametrize("name", ["a,b", "a,,b=c,", "a:b", "-a", "a b'\"\n", "json:{}", "ü,"])
def test_names_reach_qemu_img_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    qemu = QemuImg()
    qemu.run(create_empty_argv(name, 3 * M))
    assert [p.name for p in tmp_path.iterdir()] == [name]
    qemu.run(create_empty_argv("overlay", M, f"./{name}", "qcow2"))
    options = image_opts({"driver": "qcow2", "file.filename": "overlay"})
    info = json.loads(qemu.read(["info", "--output=json", "--image-opts", options]))
    assert info["backing-filename"] == f"./{name}" and info["virtual-size"] == M
    options = image_opts({"driver": "qcow2", "file.filename": name})
    info = json.loads(qemu.read(["info", "--output=json", "--image-opts", options]))
    assert info["virtual-size"] == 3 * M
    qemu.run(resize_shrink_argv(name, "qcow2", 2 * M))
    qemu.run(rebase_unsafe_argv(name, "qcow2", None))


@needs_qemu
def test_version() -> None:
    first = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True).stdout
    major, minor, micro = QemuImg().version()
    assert f"version {major}.{minor}.{micro}" in first


def test_which_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: QemuImg) -> None:
    monkeypatch.setenv("QCHAIN_QEMU_IMG", fake.program)
    assert QemuImg().program == fake.program
    monkeypatch.delenv("QCHAIN_QEMU_IMG")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert QemuImg().program == fake.program
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ImageError, match="qemu-img: not found") as caught:
        QemuImg()
    assert caught.value.exit_code is ExitCode.INVALID
    with pytest.raises(ImageError, match="not found or not executable"):
        QemuImg(tmp_path / "script")


def test_what_the_child_gets(tmp_path: Path, fake: QemuImg) -> None:
    (tmp_path / "elsewhere").mkdir()
    fake.run(["verb", "$HOME;`x`", "a b"], cwd=tmp_path / "elsewhere")
    got = report(tmp_path)
    assert got["argv"] == ["verb", "$HOME;`x`", "a b"]  # no shell
    assert got["cwd"] == str(tmp_path / "elsewhere")
    assert got["locale"] == "C" and got["stdin"] == "" and got["group"]
    assert got["core"] == 0
    soft, hard = got["files"]
    assert soft == hard


def test_progress(tmp_path: Path, fake: QemuImg) -> None:
    script(
        tmp_path,
        """
        for piece in ["  (0.00/100%)\\r", "  (12.", "34/1", "00%)\\r", "  (100.00/100%)\\r\\n"]:
            sys.stdout.write(piece); sys.stdout.flush(); time.sleep(0.1)
        """,
    )
    heard: list[float] = []
    fake.run(["rebase", "-p"], heard.append)
    assert heard == [0.0, pytest.approx(0.1234), 1.0]


@needs_qemu
def test_progress_of_the_real_one(tmp_path: Path) -> None:
    qemu = QemuImg()
    qemu.run(create_empty_argv(tmp_path / "base", 8 * M))
    qemu.run(create_empty_argv(tmp_path / "top", 8 * M, "base", "qcow2"))
    heard: list[float] = []
    qemu.run(commit_argv(tmp_path / "base", tmp_path / "top"), heard.append)
    assert heard[-1] == 1.0 and heard == sorted(heard)


def test_a_failure_says_verb_status_and_the_first_line(tmp_path: Path, fake: QemuImg) -> None:
    script(
        tmp_path,
        "sys.stderr.write('qemu-img: no\\x1b[31m way\\nmore\\n' + 'x' * 500000); sys.exit(3)",
    )
    with pytest.raises(QemuImgError) as caught:
        fake.run(["commit", "x"])
    error = caught.value
    assert (error.verb, error.status, error.exit_code) == ("commit", 3, ExitCode.FAILED)
    assert str(error).startswith("qemu-img commit: no\\x1b[31m way (exit code 3); every kept point")


def test_a_killed_child_is_a_failure(tmp_path: Path, fake: QemuImg) -> None:
    script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(QemuImgError, match="killed by signal 9") as caught:
        fake.run(["commit"])
    assert caught.value.status == -9


def test_a_failed_read_is_the_images_fault(tmp_path: Path, fake: QemuImg) -> None:
    script(tmp_path, "print('x'); sys.exit('bad')")
    with pytest.raises(ImageError, match="qemu-img info: bad"):
        fake.read(["info", "x"])


@pytest.mark.parametrize("verb", ["info", "rebase"])
def test_address_space_of_reading_commands_is_limited(
    tmp_path: Path, fake: QemuImg, verb: str
) -> None:
    script(
        tmp_path,
        """
        time.sleep(0.3)
        print(resource.getrlimit(resource.RLIMIT_AS)[0])
        """,
    )
    limit = int(fake.read([verb]))
    assert limit == (1 << 30 if verb == "info" else resource_limit())


def resource_limit() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)[0]


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_interrupt_ends_the_child(tmp_path: Path, fake: QemuImg, stubborn: bool) -> None:
    """A child that ignores TERM is killed after a second; either is waited for."""
    script(
        tmp_path,
        f"""
        if {stubborn}:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.stdout.write("(1.00/100%)\\r"); sys.stdout.flush()
        time.sleep(60)
        """,
    )

    def interrupt(_fraction: float) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fake.run(["rebase", "-p"], interrupt)
    took = time.monotonic() - started
    assert not alive(int(str(report(tmp_path)["pid"])))
    assert took < 10 and (took >= 1.0 or not stubborn)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_caller_ends_the_child(
    tmp_path: Path, fake: QemuImg, number: signal.Signals
) -> None:
    script(tmp_path, "time.sleep(60)")
    code = f"""
from qchain.run.qemu_img import QemuImg
try:
    QemuImg({fake.program!r}).run(["rebase"])
except KeyboardInterrupt:
    raise SystemExit(130)
"""
    caller = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 20
    while not (tmp_path / "report").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    caller.send_signal(number)
    assert caller.wait(20) == 130
    assert not alive(int(str(report(tmp_path)["pid"])))


def test_the_handler_of_sigterm_is_put_back(fake: QemuImg) -> None:
    before = signal.getsignal(signal.SIGTERM)
    fake.run(["rebase"])
    assert signal.getsignal(signal.SIGTERM) is before
