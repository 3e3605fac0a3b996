"""The set-up installs what is missing and only that; in CI a skip is a failure."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "cut", "dirname", "env", "grep", "sha256sum", "tr", "mkdir", "chmod")
PROGRAMS = ("qemu-img", "qemu-io", "mke2fs", "debugfs", "e2fsck", "sfdisk")
FOR_TESTS = (
    *("mkfs.ext4", "e2image", "getfacl", "setfacl", "strace", "mount", "losetup", "chromium"),
    *("mkfs.xfs", "mkfs.ntfs", "mkfs.vfat", "mkswap", "mkfs.btrfs"),
    *("libvirtd", "virtlogd", "virsh", "gcc", "pkg-config", "unshare"),
    *("qemu-system-x86_64", "python3-config"),
)


class Machine:
    """A checkout and a PATH on which apt-get, sudo, id and python3 only write down their calls."""

    def __init__(self, directory: Path, user: int = 0) -> None:
        self.checkout, self.bin, self.log = directory / "co", directory / "bin", directory / "log"
        self.bin.mkdir()
        (self.checkout / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "setup", self.checkout / "scripts")
        (self.checkout / "pyproject.toml").write_text("[project]\n")
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found
            (self.bin / tool).symlink_to(found)
        self.program("id", f"echo {user}")
        # What apt-get installs appears on the PATH.
        made = " ".join(str(self.bin / program) for program in PROGRAMS + FOR_TESTS)
        install = f'for p in {made}; do echo "#!/bin/sh" >$p; chmod +x $p; done'
        self.program(
            "apt-get", f'echo "apt-get $*" >>{self.log}\n[ $1 = update ] || {{ {install}; }}'
        )
        self.program("sudo", f'echo "sudo" >>{self.log}\nexec "$@"')
        pip = f'#!/bin/sh\necho "pip $*" >>{self.log}'
        self.program(
            "python3",
            f"""[ $1 = -c ] && exit 0
echo "python3 $*" >>{self.log}
mkdir -p .venv/bin
echo "# {self.checkout}/.venv" >.venv/bin/pip
printf '%s\\n' '{pip}' >.venv/bin/python
chmod +x .venv/bin/python""",
        )

    def program(self, name: str, body: str = "") -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.bin / name).chmod(0o755)

    def setup(self, *arguments: str) -> tuple[int, list[str], str]:
        """Run the set-up: exit code, what was called, what it said."""
        self.log.write_text("")
        done = subprocess.run(
            [self.bin / "bash", self.checkout / "scripts" / "setup", *arguments],
            env={"PATH": str(self.bin)},
            capture_output=True,
            text=True,
        )
        return done.returncode, self.log.read_text().splitlines(), done.stderr


APT = "apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0"
PIP = "pip -m pip install --quiet --disable-pip-version-check -e"
COMPILE = "pip -m compileall -q qchain cli"
INSTALL = [f"{PIP} .[bench,dev]", COMPILE]
FOR_TESTS_TOO = ["pip -m pip --version", f"{PIP} .[bench,dev,libvirt]", COMPILE]


def test_a_bare_machine_gets_packages_and_environment_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    code, calls, said = machine.setup()
    assert code == 0, said
    assert calls[0] == "apt-get update -qq"
    # What lies in /usr/sbin is found too, so some may be there already.
    assert calls[1].startswith(f"{APT} qemu-utils")
    assert set(calls[1].removeprefix(APT).split()) <= {"qemu-utils", "e2fsprogs", "fdisk"}
    assert calls[2:] == ["python3 -m venv --clear .venv", *INSTALL]
    assert machine.setup() == (0, [], "")


def test_only_what_changed_is_done_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.setup()
    (machine.checkout / "pyproject.toml").write_text("[project] # changed\n")
    code, calls, _ = machine.setup()
    assert code == 0 and calls == ["pip -m pip --version", *INSTALL]
    (machine.bin / "strace").unlink()
    assert machine.setup() == (0, [], "")
    code, calls, _ = machine.setup("tests")
    assert code == 0
    assert calls == ["apt-get update -qq", f"{APT} strace", *FOR_TESTS_TOO]
    assert machine.setup("tests") == (0, [], "")
    assert machine.setup() == (0, [], "")


def test_a_checkout_that_was_moved_gets_a_new_environment(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.setup()
    machine.checkout = machine.checkout.rename(tmp_path / "elsewhere")
    code, calls, _ = machine.setup()
    assert code == 0 and calls == ["python3 -m venv --clear .venv", *INSTALL]


def test_an_installation_that_failed_is_not_taken_for_done(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.setup()
    python = machine.checkout / ".venv" / "bin" / "python"
    works = python.read_text()
    (machine.checkout / "pyproject.toml").write_text("[project] # changed\n")
    python.write_text(works + "[ $3 != install ]\n")
    assert machine.setup()[0] != 0
    python.write_text(works)
    code, calls, _ = machine.setup()
    assert code == 0 and INSTALL[0] in calls


def test_a_user_needs_sudo(tmp_path: Path) -> None:
    machine = Machine(tmp_path, user=1000)
    code, calls, _ = machine.setup()
    assert code == 0 and calls[:2] == ["sudo", "apt-get update -qq"]
    (machine.bin / "qemu-io").unlink()
    (machine.bin / "sudo").unlink()
    code, calls, said = machine.setup()
    assert code != 0 and calls == []
    assert "no sudo; as root: " in said


def test_what_is_still_missing_is_named(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.program("apt-get")
    code, _, said = machine.setup()
    assert code != 0
    assert "still missing: qemu-img qemu-io " in said


SKIPS = """
import pytest

@pytest.mark.skipif(True, reason="no tool A")
def test_marked(): ...

def test_called():
    pytest.skip("no tool B")

@pytest.mark.xfail(strict=True)
def test_expected_failure():
    raise AssertionError

def test_fine(): ...
"""
MODULE = "import pytest\npytest.importorskip('no_such_module')\n"


@pytest.mark.parametrize(
    ("variable", "workers"), [(None, "0"), ("CI", "0"), ("QCHAIN_NO_SKIP", "1")]
)
def test_a_skip_is_a_failure_in_ci(tmp_path: Path, variable: str | None, workers: str) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_skips.py").write_text(SKIPS)
    if workers == "0":  # a module that cannot be collected ends a run with workers early
        (tmp_path / "test_module.py").write_text(MODULE)
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("QCHAIN_NO_SKIP", "CI") and not key.startswith("PYTEST")
    }
    argv = [sys.executable, "-m", "pytest", "-n", workers, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*argv, "--continue-on-collection-errors", "--rootdir", str(tmp_path), str(tmp_path)],
        env=environment | ({variable: "1"} if variable else {}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    closing = done.stdout.splitlines()[-1]
    skipped = 3 if workers == "0" else 2
    assert "1 passed" in closing and "1 xfailed" in closing
    if variable is None:
        assert done.returncode == 0 and f"{skipped} skipped" in closing
    else:
        assert done.returncode == 1 and "skipped" not in closing
        assert "nothing may be: " in done.stdout and "no tool A" in done.stdout
        assert "no tool B" in done.stdout
        assert ("no_such_module" in done.stdout) == (workers == "0")


def test_the_architecture_names_what_exists() -> None:
    """Every package has its place in docs/architecture.md, and no module there has gone."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    packages = {
        f"{path.parent.relative_to(ROOT)}/" for path in (ROOT / "qchain").glob("*/__init__.py")
    }
    assert {name for name in packages if f"`{name}`" not in text} == set()
    room, gone = ROOT, []
    for line in text.splitlines():
        if found := re.match(r"`(qchain/\w+/)`", line):
            room = ROOT / found[1]
        gone += [
            name
            for name in re.findall(r"`([\w/]+\.py)`", line)
            if not ((ROOT if "/" in name else room) / name).is_file()
        ]
    assert gone == []
