"""Every way to fail: its exit code, one line on stderr, nothing changed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_runner import COMMAND, command, run

from fixtures.build import build_chain
from fixtures.oracle import qemu_img

READERS = (["chain"], ["map"], ["hash"], ["plan", "--flatten"])


@contextmanager
def written_by_qemu_io(path: Path, *options: str) -> Iterator[int]:
    """qemu-io has the image open (for writing unless told otherwise) meanwhile."""
    argv = ["qemu-io", "-f", "qcow2", *options, str(path)]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    try:
        # It answers only once the image is open.
        child.stdin.write("length\n")
        child.stdin.flush()
        child.stdout.readline()
        yield child.pid
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "command"),
        (["nonsense"], "nonsense"),
        (["chain"], "IMAGE"),
        (["map", "--nonsense", "x"], "--nonsense"),
        (["hash", "x", "y"], "y"),
        (["chain", "x", "--progress", "loud"], "loud"),
        (["chain", "x", "--assume-format", "vmdk"], "vmdk"),
        (["plan", "x"], "--drop"),
        (["plan", "x", "--flatten", "--collapse"], "exactly one"),
        (["plan", "x", "--flatten", "--strategy", "hope"], "hope"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str) -> None:
    result = command(*arguments)
    assert words in result.fails(2)
    assert result.out == ""


@pytest.mark.parametrize("name", ["fleet", "lab"])
def test_commands_of_later_versions(name: str) -> None:
    line = run(name, "--anything", "x").fails(3)
    assert name in line and "later version" in line
    assert name not in run("--help").out.split()


@pytest.mark.parametrize("reader", READERS)
def test_missing_files(tmp_path: Path, reader: list[str]) -> None:
    chain = build_chain(tmp_path, ["64k:A", "64k:-"])
    assert "none.qcow2" in run(*reader, tmp_path / "none.qcow2").fails(4)
    assert "regular file" in run(*reader, tmp_path).fails(4)
    chain.base.unlink()
    line = run(*reader, chain.active).fails(4)
    assert str(chain.base) in line and str(chain.active) in line


@pytest.mark.parametrize("reader", READERS)
def test_a_fifo_does_not_hang(tmp_path: Path, reader: list[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "fifo" in command(*reader, tmp_path / "fifo").fails(4)


@pytest.mark.parametrize("reader", READERS)
def test_a_loop(tmp_path: Path, reader: list[str]) -> None:
    chain = build_chain(tmp_path, ["64k:A", "64k:-", "64k:-"])
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "l2.qcow2", "-F", "qcow2", chain.base)
    assert "loop" in run(*reader, chain.active).fails(4)


@pytest.mark.parametrize("reader", READERS)
def test_outside_the_gate(tmp_path: Path, reader: list[str]) -> None:
    base = build_chain(tmp_path / "elsewhere", ["64k:A"]).active
    top = tmp_path / "here" / "top.qcow2"
    top.parent.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    line = run(*reader, top).fails(4)
    assert str(base) in line and f"--allow {base.parent}" in line
    assert run(*reader, top, "--follow").code == 0
    assert run(*reader, top, "--allow", base.parent).code == 0
    assert run(*reader, top, "--allow", tmp_path / "here").code == 4


def test_allowed_by_the_environment(tmp_path: Path) -> None:
    base = build_chain(tmp_path / "elsewhere", ["64k:A"]).active
    top = tmp_path / "here" / "top.qcow2"
    top.parent.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    command("hash", top, QCHAIN_ALLOW="").fails(4)
    assert command("hash", top, QCHAIN_ALLOW=f"/nowhere:{base.parent}").code == 0


def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    secret = build_chain(tmp_path / "elsewhere", ["64k:A"]).active
    here = tmp_path / "here"
    here.mkdir()
    (here / "base.qcow2").symlink_to(secret)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", here / "top.qcow2")
    assert "--allow" in run("hash", here / "top.qcow2").fails(4)


def test_a_format_that_is_not_recorded(tmp_path: Path) -> None:
    chain = build_chain(tmp_path, ["64k:A", "64k:-"])
    content = bytearray(chain.active.read_bytes())
    at = content.index(bytes.fromhex("e2792aca"))  # the extension with the backing format
    content[at : at + 4] = b"\x01\x02\x03\x04"
    chain.active.write_bytes(content)
    assert "--assume-format" in run("chain", chain.active).fails(4)
    assert "--assume-format" in run("plan", chain.active, "--flatten").fails(3)
    assert "--assume-format" in run("merge", chain.active, "--flatten", "--yes").fails(3)
    assert run("chain", chain.active, "--assume-format", "qcow2").code == 0


def test_another_format_is_not_read_as_raw(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"KDMV" + bytes(4096))
    assert "vmdk" in run("hash", path).fails(4)
    assert run("hash", path, "--format", "raw").code == 0


@pytest.mark.parametrize("reader", [["info"], *READERS, ["map", "--layer"]])
def test_an_image_that_is_written_to(tmp_path: Path, reader: list[str]) -> None:
    chain = build_chain(tmp_path, ["64k:A", "64k:-"])
    with written_by_qemu_io(chain.active) as pid:
        line = command(*reader, chain.active).fails(3)
        assert "qemu-io" in line and str(pid) in line and "-U" in line
        assert command(*reader, "-U", chain.active).code == 0
    assert command(*reader, chain.active).code == 0


def test_an_image_that_others_only_read(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["64k:A", "64k:-"]).active
    with written_by_qemu_io(path, "-r"):
        assert command("hash", path).code == 0


def test_a_backing_file_that_is_written_to(tmp_path: Path) -> None:
    chain = build_chain(tmp_path, ["64k:A", "64k:-"])
    with written_by_qemu_io(chain.base):
        assert str(chain.base) in command("hash", chain.active).fails(3)


def test_hostile_names_stay_on_their_line(tmp_path: Path) -> None:
    name = os.fsdecode(b"[red]x\x1b]0;title\x07\n\xff.qcow2")
    path = tmp_path / name
    line = command("hash", path).fails(4)
    assert "[red]x\\x1b]0;title\\x07\\n" in line
    path.write_bytes(build_chain(tmp_path, ["64k:A"]).active.read_bytes())
    for reader in ("info", "chain", "map", "hash"):
        assert command(reader, path, "--json").code == 0
        text = command(reader, path)
        assert text.code == 0 and "\x1b" not in text.out and "\x07" not in text.out


def test_a_backing_name_with_escapes(tmp_path: Path) -> None:
    path = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "a\x1b[2J\nb", "-F", "raw", path, "64k")
    assert "a\\x1b[2J\\nb" in command("chain", path).fails(4)
    assert "\x1b" not in command("info", path).out
    assert command("info", "--json", path).json["backing"]["name"] == "a\x1b[2J\nb"


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["[cluster=512 size=4M] " + "512:A 512:- " * 4000]).active
    child = subprocess.Popen(
        [COMMAND, "map", "--json", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.read(10)
    child.stdout.close()
    _, err = child.communicate(timeout=60)
    assert err in (b"", None)


@pytest.mark.parametrize("words", ["chain --json", "map --json", "extract -o -"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_for_output(tmp_path: Path, words: str, unbuffered: str) -> None:
    path = build_chain(tmp_path, ["64k:A"]).active
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [COMMAND, *words.split(), path],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 5
    assert done.stderr.startswith("qchain: output: ") and done.stderr.count("\n") == 1


def test_an_interrupt(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        # Data as far as the filesystem knows, so that it takes long.
        os.posix_fallocate(file.fileno(), 0, 1 << 16)
    child = subprocess.Popen(
        [COMMAND, "hash", "--progress", "json", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    assert child.stderr.readline().startswith('{"event": "progress"')
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    lines = [line for line in err.splitlines() if not line.startswith("{")]
    assert (child.returncode, lines) == (130, ["qchain: interrupted: nothing was changed"])


def test_the_unexpected_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["64k:A"]).active
    for error in (ValueError("line\nbreak"), MemoryError(), RecursionError("deep")):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("qchain.chain.digest.digest", fail)
        result = run("hash", path)
        assert result.code == 5
        assert result.err.startswith("qchain: internal error: ") and result.err.count("\n") == 1
        assert type(error).__name__ in result.err
        monkeypatch.setenv("QCHAIN_DEBUG", "1")
        with pytest.raises(type(error)):
            run("hash", path)
        monkeypatch.delenv("QCHAIN_DEBUG")


def test_help_is_cheap() -> None:
    """`--help` loads nothing that only real work needs."""
    code = (
        "import sys\nfrom qchain_cli.main import main\n"
        "assert main(['--help']) == 0 and main(['plan', '--help']) == 0\n"
        "heavy = {'numpy', 'construct', 'rich.table', 'rich.console', 'zstandard'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    python = COMMAND.with_name("python")
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--strategy" in done.stdout and "--snapshot" not in done.stdout


def test_info_starts_quickly(tmp_path: Path) -> None:
    """Whole-process times are too noisy for a test: what must not be loaded is not."""
    path = build_chain(tmp_path, ["64k:A 64k:-"]).active
    code = (
        "import os, sys\nfrom qchain_cli.main import main\n"
        f"assert main(['info', {str(path)!r}]) == main(['info', '--json', {str(path)!r}]) == 0\n"
        f"assert main(['compare', {str(path)!r}, {str(path)!r}]) == 0\n"
        "heavy = {'pydantic', 'rich', 'zstandard', 'cryptography', 'concurrent.futures',"
        " 'construct', 'numpy.ma',"
        " 'logging', 'email', 'importlib.metadata', 'qchain_cli.merge', 'qchain_cli.map'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "assert len(os.listdir('/proc/self/task')) == 1, 'threads of BLAS'\n"
    )
    python = COMMAND.with_name("python")
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_merge_loads_no_engine_that_it_does_not_use(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["64k:A 64k:-", "64k:- 64k:B", "64k:C 64k:-"]).active
    code = (
        "import sys\nfrom qchain_cli.main import main\n"
        f"words = ['--collapse', {str(path)!r}]\n"
        "assert main(['plan', *words]) == main(['merge', '--yes', *words]) == 0\n"
        "heavy = {'qchain.native.build', 'qchain.qcow2.check', 'qchain.domains', 'libvirt'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    python = COMMAND.with_name("python")
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_reading_leaves_no_trace(tmp_path: Path) -> None:
    chain = build_chain(tmp_path, ["64k:A", "64k:-"])
    os.utime(chain.base, (1, 1))
    before = {path: (path.stat(), path.read_bytes()) for path in chain.paths}
    os.utime(chain.base, (1, 1))
    for reader in (["info"], *READERS):
        assert command(*reader, chain.active).code == 0
    assert chain.base.stat().st_atime == 1
    for path, (status, content) in before.items():
        assert path.stat().st_mtime_ns == status.st_mtime_ns
        assert path.read_bytes() == content
    assert sorted(tmp_path.iterdir()) == sorted(chain.paths)


def test_a_directory_to_allow_that_is_none(tmp_path: Path) -> None:
    path = build_chain(tmp_path, ["64k:A"]).active
    result = run("chain", path, "--allow", tmp_path, "--allow", tmp_path / "nope")
    assert result.code == 0
    assert result.err == (
        f"qchain: {tmp_path / 'nope'}: is no directory, so --allow lets nothing be opened there\n"
    )
