"""Every command that reads: it changes nothing, takes no lock, and does not read what is in use.

Judged by the files themselves (content, all times, attributes), by strace, by the kernel's
read-only mounts, and by a qemu-io that has an image open for writing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_runner import COMMAND, run
from test_locks import qemu_io as opened_by_qemu

from fixtures.ext4 import build_ext4_chain
from fixtures.oracle import qemu_img, qemu_io, run_tool

# NAME: an image among the evidence; @NAME: a new file elsewhere. The exit code is the answer.
COMMANDS: dict[str, tuple[str, int]] = {
    "info": ("info TOP", 0),
    "info of a bitmap": ("info --bitmap marks MID", 0),
    "info, data file": ("info DATA", 0),
    "chain": ("chain TOP", 0),
    "tree": ("tree EVIDENCE", 0),
    "map": ("map TOP", 0),
    "map of a layer": ("map --layer MID", 0),
    "map of a snapshot": ("map --snapshot point MID", 0),
    "compare": ("compare TOP MID", 1),
    "hash": ("hash TOP", 0),
    "hash of a snapshot": ("hash --snapshot point MID", 0),
    "hash, data file": ("hash DATA", 0),
    "check": ("check MID", 1),
    "diff": ("diff MID TOP", 1),
    "diff of files": ("diff --files MID TOP", 1),
    "extract": ("extract TOP -o @raw", 0),
    "extract to a pipe": ("extract TOP -o - --range 0:64k", 0),
    "leaks": ("leaks MID", 0),
    "leaks saved": ("leaks MID --extract @leaks", 0),
    "report": ("report TOP -o @report.html", 0),
    "seal": ("seal TOP -o @seal", 0),
    "verify": ("verify TOP --seal SEAL", 0),
    "plan": ("plan TOP --drop MID", 3),
    "merge --dry-run": ("merge TOP --drop MID --dry-run --yes", 3),
    "plan without a snapshot": ("plan TOP --flatten --keep-files", 3),
}


class Evidence:
    """base <- mid (a snapshot, a bitmap, a leak) <- top; and an image with a data file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "evidence"
        self.elsewhere = directory / "elsewhere"
        self.elsewhere.mkdir()
        base, mid, top, unused = build_ext4_chain(self.directory, size=64 << 20).paths
        unused.unlink()
        qemu_img("bitmap", "--add", mid, "marks")
        qemu_img("snapshot", "-c", "point", mid)
        data = self.directory / "data.qcow2"
        words = ["-f", "qcow2", "-o", "data_file=data.qcow2.data", data.name, "1M"]
        run_tool(["qemu-img", "create", "-q", *words], cwd=self.directory)
        qemu_io(data, ["write -q -P 1 0 64k", "write -q -z 128k 64k"], "qcow2", cwd=self.directory)
        # A leaked cluster at the end, with something in it.
        raw = bytearray(mid.read_bytes())
        block = int.from_bytes(raw[(at := int.from_bytes(raw[48:56], "big")) : at + 8], "big")
        last = len(raw) // 65536 * 65536
        raw[last:] = raw[last:].ljust(65536, b"\0") + b"left over".ljust(65536, b"\0")
        raw[block + last // 65536 * 2 + 2 : block + last // 65536 * 2 + 4] = b"\0\1"
        mid.write_bytes(raw)
        self.images = {"BASE": base, "MID": mid, "TOP": top, "DATA": data}
        seal = self.directory / "top.seal.json"
        assert run("seal", top, "-o", seal).code == 0
        self.names = {**self.images, "EVIDENCE": self.directory, "SEAL": seal}
        link = self.directory / "link.qcow2"
        link.symlink_to(top.name)
        for path in (*self.directory.iterdir(), self.directory):
            # Before the last change: even a lazy kernel would note that it was read.
            os.utime(path, (1, 2), follow_symlinks=False)

    def words(self, line: str, root: Path | None = None) -> list[str]:
        """The words of a command; `root`: where the evidence is mounted."""
        out = []
        for word in line.split():
            if word.startswith("@"):
                out.append(str(self.elsewhere / word[1:]))
            elif word in self.names:
                place = self.names[word]
                if root is not None:
                    place = root / place.relative_to(self.directory)
                out.append(str(place))
            else:
                out.append(word)
        return out

    def state(self) -> dict[str, Any]:
        """All that a reader could change, of every file and of the directory."""
        out: dict[str, Any] = {}
        for path in (self.directory, *sorted(self.directory.iterdir())):
            digest = b""
            if path.is_file() and not path.is_symlink():
                fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
                with os.fdopen(fd, "rb") as file:
                    digest = hashlib.sha256(file.read()).digest()
            status = path.lstat()
            out[path.name] = (
                digest,
                {name: getattr(status, name) for name in dir(status) if name.startswith("st_")},
                [(each, os.getxattr(path, each)) for each in os.listxattr(path)],
            )
        return out


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return Evidence(tmp_path_factory.mktemp("reading"))


@pytest.fixture
def untouched(evidence: Evidence) -> Iterator[Evidence]:
    """The evidence, compared afterwards."""
    for path in evidence.elsewhere.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = evidence.state()
    yield evidence
    assert evidence.state() == before


def test_reading_is_noted_here(tmp_path: Path) -> None:
    """Without care the access time changes: what the other tests watch is not blind."""
    for path in (tmp_path / "file", tmp_path / "directory"):
        path.mkdir() if path.name == "directory" else path.write_bytes(b"x")
        os.utime(path, (1, 2))
        os.listdir(path) if path.is_dir() else path.read_bytes()  # noqa: PTH208
        assert path.stat().st_atime != 1


CHANGES = (
    "unlink|rename|mkdir|rmdir|link|symlink|chmod|chown|utime|truncate|setxattr|removexattr|mknod"
    "|fallocate|creat|f(truncate|chmod|chown|setxattr)|ioctl"
)
TRACED = "%file,fcntl,flock,ftruncate,fallocate,fchmod,fchown,fsetxattr,utimensat,ioctl"


def cannot_trace() -> bool:
    probe = ["strace", "-o", os.devnull, "true"]
    return not shutil.which("strace") or subprocess.run(probe, capture_output=True).returncode != 0


@pytest.mark.skipif(cannot_trace(), reason="needs strace")
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_changes(name: str, untouched: Evidence, tmp_path: Path) -> None:
    line, expected = COMMANDS[name]
    log = tmp_path / "log"
    strace = ["strace", "-f", "-y", "-s", "4096", "-o", str(log), "-e", f"trace={TRACED}"]
    words = untouched.words(line)
    done = subprocess.run([*strace, COMMAND, *words], capture_output=True, cwd=tmp_path)
    assert done.returncode == expected, done.stderr
    assert b"internal error" not in done.stderr
    touching = [
        text.partition(" ")[2].strip()
        for text in log.read_text(errors="replace").splitlines()
        if f"{untouched.directory}/" in text or f'{untouched.directory}"' in text
    ]
    opened = [text for text in touching if text.startswith("open")]
    assert opened, "strace saw nothing"
    for text in touching:
        if text.startswith("open"):
            assert not re.search("O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", text), text
            # O_PATH gives a descriptor by which nothing can be read.
            timeless = "O_NOATIME" in text or "O_PATH" in text
            assert timeless or re.search("= -1 ENO", text), text
        elif text.startswith(("fcntl", "flock")):
            # To ask for a lock's holder is not to take one.
            assert not re.search(r"F_(OFD_)?SETLKW?\b|LOCK_", text), text
        else:
            assert not re.match(CHANGES, text), text


def can_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


@contextmanager
def read_only(directory: Path, at: Path) -> Iterator[Path]:
    """The directory at another place, where the kernel lets nobody change anything."""
    at.mkdir()
    subprocess.run(["mount", "--bind", directory, at], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", at], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (at / "new").touch()
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.mark.skipif(not can_mount(), reason="needs root")
def test_read_only_files_and_directories(untouched: Evidence, tmp_path: Path) -> None:
    with read_only(untouched.directory, tmp_path / "ro") as root:
        for line, expected in COMMANDS.values():
            done = subprocess.run([COMMAND, *untouched.words(line, root)], capture_output=True)
            assert done.returncode == expected, (line, done.stderr)
            assert b"read-only" not in done.stderr.lower(), (line, done.stderr)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_files_of_somebody_else(tmp_path: Path) -> None:
    """The kernel grants O_NOATIME to the owner alone: others read all the same."""
    (tmp_path / "files").mkdir(mode=0o755)
    path = tmp_path / "files" / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    path.chmod(0o444)
    tmp_path.chmod(0o755)
    # Whoever may not search the directories above could not even name it.
    fd = os.open(tmp_path, os.O_RDONLY)
    from qchain.hostfile import HostFile, names_in

    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.fchdir(fd)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with HostFile("files/image") as file:
                code = file.pread(0, 4) != b"QFI\xfb"
            code = code or "image" not in names_in("files")
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(fd)


@pytest.fixture
def used(tmp_path: Path) -> Evidence:
    """Evidence of its own: qemu writes to what it opens for writing, even if nobody asks it to."""
    return Evidence(tmp_path)


@pytest.mark.parametrize("who", ["TOP", "MID", "BASE"])
def test_an_image_in_use_is_refused(who: str, used: Evidence) -> None:
    """By all that read its content or its map; with -U they read it as it stands."""
    image = used.images[who]
    with opened_by_qemu("-f", "qcow2", image) as pid:
        for line, expected in COMMANDS.values():
            # In this process there is no pipe.
            if line.startswith("tree") or "-o -" in line:
                continue
            words = used.words(line)
            alone = line.startswith(("info", "check", "leaks", "map --layer"))
            named = who in line.split() or (not alone and concerns(who, line))
            refused = run(*words)
            if named:
                assert refused.code == 3, (line, refused)
                said = refused.fails(3)
                assert f"{image}: in use by qemu-io (pid {pid})" in said, (line, said)
                again = run(*words, "-U")
                # What is in use may well have been changed since it was sealed.
                assert again.code == expected or line.startswith("verify"), (line, again.err)
            else:
                assert refused.code == expected, (line, refused.err)
            for path in used.elsewhere.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_tree_names_what_is_in_use(used: Evidence) -> None:
    """It reads headers only, and the rest of the directory is no less readable."""
    image = used.images["MID"]

    def warnings(*options: str) -> dict[str, list[str]]:
        listed = run("tree", "--json", *options, used.directory).json["images"]
        return {each["path"]: each["warnings"] for each in listed if each["warnings"]}

    quiet = warnings("-U")
    with opened_by_qemu("-f", "qcow2", image) as pid:
        said = f"in use by qemu-io (pid {pid}): this may change at any moment"
        assert said in warnings()[str(image)]
        assert f"? {said}" in run("tree", used.directory).out
        assert not any(said in each for each in warnings("-U").values())
    assert all("in use" not in text for each in quiet.values() for text in each)


def concerns(who: str, line: str) -> bool:
    """Whether a chain that the command opens holds the image."""
    below = {"TOP": ("TOP", "MID", "BASE"), "MID": ("MID", "BASE"), "DATA": ()}
    return any(who in below.get(word, ()) for word in line.split())


def test_a_data_file_in_use_is_refused(used: Evidence) -> None:
    with opened_by_qemu("-f", "raw", f"{used.images['DATA']}.data"):
        for words in (["hash"], ["map"], ["chain"]):
            assert "in use" in run(*words, used.images["DATA"]).fails(3)
            assert run(*words, "-U", used.images["DATA"]).code == 0


def test_a_reader_is_no_reason_to_refuse(used: Evidence) -> None:
    with opened_by_qemu("-r", "-f", "qcow2", used.images["TOP"]):
        for line, expected in COMMANDS.values():
            if "-o -" in line or line.startswith("verify"):
                continue
            result = run(*used.words(line))
            assert result.code == expected, (line, result.err)
            for path in used.elsewhere.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_no_lock_is_held_while_reading(tmp_path: Path) -> None:
    """A guest that is started meanwhile gets its image."""
    disk = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, "1M")
    script = (
        "import sys\nfrom pathlib import Path\nfrom qchain import open_chain\n"
        "with open_chain(Path(sys.argv[1])):\n    print('open', flush=True)\n    input()\n"
    )
    python = COMMAND.with_name("python")
    reader = subprocess.Popen(
        [python, "-c", script, disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None and reader.stdout.readline() == "open\n"
    qemu_io(disk, ["write -q -P 1 0 64k"], "qcow2")
    reader.communicate("\n")
    assert reader.returncode == 0
