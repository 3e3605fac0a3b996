"""What the bare qemu-img commands do, and why qchain does not use them bare.

One test per trap of qemu-img (numbers as in the project's notes). The judge is
qemu-img itself. For trap 0 also the order that avoids it, the two-phase pull,
killed at every system call that writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qchain.plan.commands import (
    commit_argv,
    create_empty_argv,
    image_opts,
    rebase_safe_argv,
    rebase_unsafe_argv,
    resize_shrink_argv,
)
from qchain.run.qemu_img import QemuImg

K, M = 1024, 1024 * 1024

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="needs qemu-img, qemu-io"
)


def qemu_img(*argv: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def create(
    path: Path,
    size: int,
    backing: str | Path | None = None,
    backing_format: str = "qcow2",
    image_format: str = "qcow2",
    options: str = "",
) -> Path:
    argv: list[object] = ["create", "-q", "-f", image_format]
    if options:
        argv += ["-o", options]
    if backing is not None:
        argv += ["-b", backing, "-F", backing_format]
    qemu_img(*argv, path.absolute(), size)
    return path


def write(path: Path, *commands: str, image_format: str = "qcow2") -> None:
    flags = [word for command in commands for word in ("-c", command)]
    options = image_opts({"driver": image_format, "file.filename": path})
    done = subprocess.run(
        ["qemu-io", *flags, "--image-opts", options], capture_output=True, text=True
    )
    assert done.returncode == 0 and "rror" not in done.stdout + done.stderr, done


def content(path: Path, image_format: str = "qcow2") -> bytes:
    """The guest-visible content, opened by its own name, as qemu-img sees it."""
    out = path.absolute().with_name(".content.raw")
    source = image_opts({"driver": image_format, "file.filename": path.absolute()})
    qemu_img("convert", "-O", "raw", "--image-opts", source, out)
    data = out.read_bytes()
    out.unlink()
    return data


def own_map(path: Path) -> list[dict[str, object]]:
    extents = json.loads(qemu_img("map", "-f", "qcow2", "--output=json", path))
    return [extent for extent in extents if extent["depth"] == 0 and extent["present"]]


# --- the two-phase pull -------------------------------------------------------------


@dataclass(frozen=True)
class Pull:
    """Pull `image` off `present` (verbatim header name) onto `new` (absolute) or nothing."""

    image: Path
    present: str
    present_format: str
    new: Path | None
    new_name: str | None
    new_format: str | None
    in_chain: bool = True
    work: str = ".qchain-ab12"

    def steps(self) -> Iterator[Callable[[], None] | tuple[list[str], Path]]:
        """In order; qemu-img's as (argv, cwd), so that a test can interfere."""
        here = self.image.parent
        work, alias = here / self.work, f"{self.work}.b"
        yield work.mkdir
        yield lambda: os.link(self.image, work / "image")
        size = virtual_size(self.image)
        present_size = virtual_size(
            Path(os.path.normpath(here / self.present)), self.present_format
        )
        yield create_empty_argv(alias, present_size, self.present, self.present_format), here
        if self.new is None:
            yield create_empty_argv(work / alias, size), here
        elif self.usable_directly():
            target = self.new
            yield lambda: (work / alias).symlink_to(target)
        else:
            assert self.new_format is not None
            new_size = virtual_size(self.new, self.new_format)
            yield create_empty_argv(work / alias, new_size, self.new, self.new_format), here
        yield lambda: os.sync()
        yield (
            rebase_safe_argv(work / "image", alias, self.present, self.present_format),
            here,
        )
        yield lambda: os.sync()
        yield rebase_unsafe_argv(self.image, "qcow2", self.new_name, self.new_format), here
        yield lambda: shutil.rmtree(work)
        yield (here / alias).unlink

    def usable_directly(self) -> bool:
        # In the chain, qemu finds it there and never opens the alias. But seen from
        # the work directory a name like '../x' may mean another file: were that the
        # new backing, qemu would think that nothing is between and pull nothing.
        from_work = os.path.realpath(self.image.parent / self.work / self.present)
        return self.in_chain and from_work != os.path.realpath(self.new or "")

    def run(self, qemu: Callable[[list[str], Path], bool] | None = None) -> bool:
        """All steps; False if `qemu` says that its command was killed."""
        program = QemuImg()
        for step in self.steps():
            if callable(step):
                step()
            elif qemu is None:
                program.run(step[0], cwd=step[1])
            elif not qemu(*step):
                return False
        return True


def virtual_size(path: Path, image_format: str = "qcow2") -> int:
    options = image_opts({"driver": image_format, "file.filename": path.absolute()})
    info = json.loads(qemu_img("info", "-U", "--output=json", "--image-opts", options))
    return int(info["virtual-size"])


def three(directory: Path, base_format: str = "raw", **options: str) -> tuple[Path, Path, Path]:
    """base <- mid <- top, each with data of its own, overlapping; sizes differ."""
    base = create(directory / "base", 1 * M, image_format=base_format)
    write(base, "write -P 1 0 768k", image_format=base_format)
    mid = create(directory / "mid", 896 * K, "base", base_format, **options)
    write(mid, "write -P 2 128k 256k", "write -z 512k 64k", "write -P 4 800k 13k")
    top = create(directory / "top", 1 * M + 64 * K, "mid", **options)
    write(top, "write -P 3 192k 64k")
    return base, mid, top


NAMES = ["a b", "a,b=c", "a:b", "-a", "a\"b'c", "a\nb", "ä\u200b", "json:{}", "%s$HOME"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flat", [False, True])
def test_two_phase_pull_with_hostile_names(tmp_path: Path, name: str, flat: bool) -> None:
    base, mid, top = three(tmp_path)
    backing = tmp_path / f"{name}.mid"
    mid.rename(backing)
    image = tmp_path / name
    top.rename(image)
    recorded = f"./{backing.name}" if ":" in name else backing.name
    QemuImg().run(rebase_unsafe_argv(image, "qcow2", recorded, "qcow2"))
    old = content(image)
    Pull(image, recorded, "qcow2", None if flat else base, None if flat else "base",
         None if flat else "raw").run()  # fmt: skip
    backing.unlink()
    assert content(image) == old
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["base", name])


@pytest.mark.parametrize("options", ["compat=0.10", "cluster_size=512", "extended_l2=on", ""])
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize("new", ["base", "none", "outside", "raw outside"])
def test_two_phase_pull_of_every_kind(
    tmp_path: Path, options: str, base_format: str, new: str
) -> None:
    if options == "compat=0.10":
        base, mid, top = three_v2(tmp_path, base_format)
    else:
        base, mid, top = three(tmp_path, base_format, options=options)
    old = content(top)
    target: Path | None = base
    target_format: str | None = base_format
    if new == "none":
        target = target_format = None
    elif new.endswith("outside"):
        # In another directory, itself an overlay by a relative name.
        (tmp_path / "else").mkdir()
        target_format = "raw" if new.startswith("raw") else "qcow2"
        lower = create(tmp_path / "else" / "lower", 3 * M)
        write(lower, "write -P 1 0 512k", "write -P 9 1M 512k")
        target = tmp_path / "else" / "outside"
        if target_format == "raw":
            qemu_img("convert", "-O", "raw", lower, target)
        else:
            create(target, 2 * M, "lower")
            write(target, "write -P 8 640k 128k")
    name = None if target is None else os.path.relpath(target, tmp_path)
    Pull(top, "mid", "qcow2", target, name, target_format, in_chain=target == base).run()
    mid.unlink()
    assert content(top) == old
    qemu_img("check", "-q", top)


def three_v2(directory: Path, base_format: str) -> tuple[Path, Path, Path]:
    base, mid, top = three(directory, base_format)
    mid.unlink()
    top.unlink()
    create(mid, 896 * K, "base", base_format, options="compat=0.10")
    write(mid, "write -P 2 128k 256k", "write -P 4 800k 13k")
    create(top, 1 * M + 64 * K, "mid", options="compat=0.10")
    write(top, "write -P 3 192k 64k")
    return base, mid, top


@pytest.mark.parametrize("absolute", [False, True])
def test_two_phase_pull_across_directories(tmp_path: Path, absolute: bool) -> None:
    """Relative names all along: each is right only from its own image's directory."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    create(tmp_path / "a" / "base", M)
    write(tmp_path / "a" / "base", "write -P 1 0 1M")
    create(tmp_path / "b" / "low", M, "../a/base")
    create(tmp_path / "b" / "mid", M, "low")
    write(tmp_path / "b" / "mid", "write -P 2 64k 64k")
    present = str(tmp_path / "b" / "mid") if absolute else "../b/mid"
    top = create(tmp_path / "c" / "top", M, present)
    write(top, "write -P 3 512k 64k")
    old = content(top)
    Pull(top, present, "qcow2", tmp_path / "b" / "low", "../b/low", "qcow2").run()
    (tmp_path / "b" / "mid").unlink()
    assert content(top) == old
    assert len(own_map(top)) == 2  # pulled what was between, not the base


def test_two_phase_pull_is_not_misled_by_names_seen_from_the_work_directory(
    tmp_path: Path,
) -> None:
    """top's '../mid' is another file, seen from the work directory: the new backing."""
    (tmp_path / "d").mkdir()
    new = create(tmp_path / "d" / "mid", M)
    mid = create(tmp_path / "mid", M, "d/mid")
    write(mid, "write -P 2 0 64k")
    top = create(tmp_path / "d" / "top", M, "../mid")
    old = content(top)
    pull = Pull(top, "../mid", "qcow2", new, "mid", "qcow2")
    assert not pull.usable_directly()
    pull.run()
    mid.unlink()
    assert content(top) == old


# --- trap 0: killed, or without power -----------------------------------------------


def cannot_trace() -> bool:
    probe = ["strace", "-o", os.devnull, "true"]
    return not shutil.which("strace") or subprocess.run(probe, capture_output=True).returncode != 0


needs_strace = pytest.mark.skipif(cannot_trace(), reason="needs strace")


def killed_run(argv: list[str], cwd: Path, call: str, nth: int) -> bool:
    """qemu-img, killed at the nth `call` of one of its threads; True if it ended well."""
    inject = f"inject={call}:signal=KILL:when={nth}"
    done = subprocess.run(
        ["strace", "-f", "-o", os.devnull, "-e", f"trace={call}", "-e", inject, "qemu-img", *argv],
        cwd=cwd,
        capture_output=True,
    )
    return done.returncode == 0


def kill_points() -> list[tuple[str, int]]:
    # strace counts per thread: the first of each kind always comes, others may not.
    return [("pwrite64", n) for n in (1, 2, 3)] + [("fdatasync", n) for n in (1, 2)]


def plain_rebase(image: Path, base: Path, flat: bool) -> list[str]:
    argv = rebase_unsafe_argv(image, "qcow2", None if flat else base, None if flat else "raw")
    argv.remove("-u")
    return argv


@needs_strace
@pytest.mark.parametrize("flat", [False, True])
def test_trap_0_a_plain_rebase_killed_at_its_end_loses_data(tmp_path: Path, flat: bool) -> None:
    lost = []
    for number, (call, nth) in enumerate(kill_points()):
        directory = tmp_path / str(number)
        directory.mkdir()
        base, _, top = three(directory)
        old = content(top)
        killed_run(plain_rebase(top, base, flat), directory, call, nth)
        if content(top) != old:
            lost.append((call, nth))
    assert lost, "rebase has become crash-safe: the two-phase pull is no longer needed"


@needs_strace
@pytest.mark.parametrize("flat", [False, True])
def test_trap_0_the_two_phase_pull_never_does(tmp_path: Path, flat: bool) -> None:
    killed = 0
    for number, (call, nth) in enumerate(kill_points()):
        directory = tmp_path / str(number)
        directory.mkdir()
        base, _, top = three(directory)
        old = content(top)

        def qemu(argv: list[str], cwd: Path, call: str = call, nth: int = nth) -> bool:
            if argv[0] == "create":
                return QemuImg().run(argv, cwd=cwd) is None
            return killed_run(argv, cwd, call, nth)

        new = (None, None, None) if flat else (base, "base", "raw")
        pull = Pull(top, "mid", "qcow2", *new)
        if not pull.run(qemu):
            killed += 1
            assert content(top) == old, (call, nth)
            # Recovery: the old backing again (the same content), all from the start.
            QemuImg().run(rebase_unsafe_argv(top, "qcow2", "mid", "qcow2"))
            assert content(top) == old, (call, nth)
            shutil.rmtree(directory / pull.work)
            (directory / f"{pull.work}.b").unlink()
            pull.run()
        (directory / "mid").unlink()
        assert content(top) == old, (call, nth)
    assert killed >= 2, "the injection did not work: nothing was proven"


@dataclass(frozen=True)
class Write:
    offset: int
    data: bytes


FLUSH = Write(-1, b"")


def recorded_writes(argv: list[str], cwd: Path, log: Path) -> list[Write]:
    """What `qemu-img *argv` writes to its image, in order, with the flushes in between."""
    calls = "trace=pwrite64,pwritev,fdatasync,fsync,fallocate,ftruncate"
    strace = ["strace", "-f", "-o", str(log), "-xx", "-s", "4194304", "-e", calls]
    subprocess.run([*strace, "qemu-img", *argv], cwd=cwd, check=True, capture_output=True)
    writes = []
    for line in log.read_text().splitlines():
        if re.search(r"\b(fdatasync|fsync)\(", line):
            writes.append(FLUSH)
        elif re.search(r"\b(pwrite64|pwritev)\(", line):
            text = "".join(re.findall(r'"([^"]*)"', line))
            data = bytes.fromhex(text.replace("\\x", ""))
            numbers = re.search(r", (\d+)(?:\) += \d+| <unfinished \.\.\.>)$", line)
            assert numbers and data, line[-200:]
            writes.append(Write(int(numbers[1]), data))
        else:
            assert "resumed" in line or "+++" in line or "ftruncate" in line, line[:200]
    return writes


def crash_states(writes: list[Write], seed: int = 0) -> Iterator[tuple[str, list[Write]]]:
    """Which writes reached the disk: after a kill, a prefix; after a power loss, all up
    to the last flush and any of those that followed it."""
    draw = random.Random(seed)
    for end in range(len(writes) + 1):
        yield f"killed after {end}", [w for w in writes[:end] if w is not FLUSH]
        flushed = max((n for n in range(end) if writes[n] is FLUSH), default=0)
        durable = [w for w in writes[:flushed] if w is not FLUSH]
        pending = [w for w in writes[flushed:end] if w is not FLUSH]
        if len(pending) > 1:
            yield f"power lost after {end}, last only", [*durable, pending[-1]]
            some = [w for w in pending if draw.random() < 0.5]
            yield f"power lost after {end}, {len(some)} of {len(pending)}", durable + some


def lost_states(image: Path, before: bytes, writes: list[Write], old: bytes) -> list[str]:
    """The crash states in which the image, by its own name, does not read as of old."""
    lost = []
    after = image.read_bytes()
    for name, reached in crash_states(writes):
        with image.open("r+b") as file:
            file.write(before)
            file.truncate()
            for write_ in reached:
                file.seek(write_.offset)
                file.write(write_.data)
        try:
            same = content(image) == old
        except AssertionError:
            same = False
        if not same:
            lost.append(name)
    image.write_bytes(after)
    return lost


@needs_strace
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("options", ["lazy_refcounts=off", "lazy_refcounts=on"])
def test_trap_0_every_crash_state(tmp_path: Path, flat: bool, options: str) -> None:
    """Recorded writes replayed up to every point: a kill is a prefix, power loss a subset."""
    base, _, top = three(tmp_path, options=options)
    old, before = content(top), top.read_bytes()
    plain = tmp_path / "plain"
    plain.write_bytes(before)
    writes = recorded_writes(plain_rebase(plain, base, flat), tmp_path, tmp_path / "log")
    assert lost_states(plain, before, writes, old), "a plain rebase lost nothing"

    checked = 0

    def qemu(argv: list[str], cwd: Path) -> bool:
        nonlocal checked
        if argv[0] == "create":
            return QemuImg().run(argv, cwd=cwd) is None
        before = top.read_bytes()
        writes = recorded_writes(argv, cwd, tmp_path / "log")
        # Recording is complete only if it makes the same file.
        with (tmp_path / "again").open("w+b") as again:
            again.write(before)
            for write_ in (w for w in writes if w is not FLUSH):
                again.seek(write_.offset)
                again.write(write_.data)
        assert (tmp_path / "again").read_bytes().rstrip(b"\0") == top.read_bytes().rstrip(b"\0")
        assert lost_states(top, before, writes, old) == []
        checked += len(writes)
        return True

    new = (None, None, None) if flat else (base, "base", "raw")
    assert Pull(top, "mid", "qcow2", *new).run(qemu)
    assert checked > 5
    (tmp_path / "mid").unlink()
    assert content(top) == old


@needs_strace
@pytest.mark.parametrize("remedy", [False, True])
def test_trap_0_lazy_refcounts_lose_data_in_a_power_loss(tmp_path: Path, remedy: bool) -> None:
    """L2 tables that leave a small cache early: as on a disk larger than the cache covers."""
    base = create(tmp_path / "base", 12 * M)
    mid = create(tmp_path / "mid", 12 * M, "base")
    write(mid, *[f"write -P {n + 1} {n * 2048 + 64}k 8k" for n in range(6)])
    top = create(tmp_path / "top", 12 * M, "mid", options="lazy_refcounts=on,cluster_size=4k")
    old = content(top)
    lost: list[str] = []

    def qemu(argv: list[str], cwd: Path) -> bool:
        if argv[0] == "create":
            return QemuImg().run(argv, cwd=cwd) is None
        if "--image-opts" in argv:
            argv[-1] += ",l2-cache-size=8k,l2-cache-entry-size=4k"
            assert "lazy-refcounts=off" in argv[-1]
            if not remedy:
                argv[-1] = argv[-1].replace("lazy-refcounts=off", "lazy-refcounts=on")
        before = top.read_bytes()
        writes = recorded_writes(argv, cwd, tmp_path / "log")
        lost.extend(lost_states(top, before, writes, old))
        return True

    assert Pull(top, "mid", "qcow2", base, "base", "qcow2").run(qemu)
    assert content(top) == old
    assert bool(lost) is not remedy, lost


# --- traps 1 to 10 -----------------------------------------------------------------


def test_trap_1_convert_onto_a_deeper_backing_loses_what_lies_between(tmp_path: Path) -> None:
    base, _, top = three(tmp_path)
    out = tmp_path / "out"
    qemu_img("convert", "-O", "qcow2", "-B", base, "-F", "raw", top, out)
    assert content(out) != content(top)
    # The remedy's first half: onto the immediate backing nothing is lost.
    qemu_img("convert", "-O", "qcow2", "-B", tmp_path / "mid", "-F", "qcow2", top, out)
    assert content(out) == content(top)


def test_trap_2_rebase_turns_zero_clusters_into_data(tmp_path: Path) -> None:
    base = create(tmp_path / "base", M)
    write(base, "write -P 1 0 1M")
    mid = create(tmp_path / "mid", M, "base")
    write(mid, "write -z 0 64k")
    top = create(tmp_path / "top", M, "mid")
    assert [(e["data"], e["zero"]) for e in own_map(mid)] == [(False, True)]
    qemu_img("rebase", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    assert [(e["length"], e["data"], e["zero"]) for e in own_map(top)] == [(64 * K, True, False)]


def test_trap_3_rebase_skips_equal_data_and_commit_writes_it(tmp_path: Path) -> None:
    base = create(tmp_path / "base", M)
    mid = create(tmp_path / "mid", M, "base")
    write(mid, "write -P 0 0 64k")
    top = create(tmp_path / "top", M, "mid")
    qemu_img("rebase", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    assert own_map(top) == []
    QemuImg().run(commit_argv(base, mid))
    assert [(e["length"], e["data"]) for e in own_map(base)] == [(64 * K, True)]


def test_trap_4_commit_moves_in_the_granularity_of_the_base(tmp_path: Path) -> None:
    base = create(tmp_path / "base", M, image_format="raw")
    before = base.stat().st_blocks
    top = create(tmp_path / "top", M, "base", "raw", options="cluster_size=4k")
    write(top, "write -P 1 128k 4k")
    QemuImg().run(commit_argv(base, top))
    assert (base.stat().st_blocks - before) * 512 == 64 * K


def test_trap_5_rebase_writes_single_sectors(tmp_path: Path) -> None:
    if QemuImg().version() >= (8, 2, 0):
        pytest.skip("aligned to clusters from 8.2 on")
    base = create(tmp_path / "base", M)
    write(base, "write -P 1 0 64k")
    mid = create(tmp_path / "mid", M, "base")
    write(mid, "write -P 2 0 512", "write -P 2 1024 512")
    top = create(tmp_path / "top", M, "mid")
    argv = ["rebase", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(top)]
    done = subprocess.run(
        ["qemu-img", "--trace", "enable=blk_co_pwritev", *argv], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if "blk_co_pwritev" not in done.stderr:
        pytest.skip("built without tracing to stderr")
    requests = [line for line in done.stderr.splitlines() if "blk_co_pwritev" in line]
    assert len(requests) == 2 and all("bytes 512 " in line for line in requests), requests


def test_trap_6_a_reader_of_an_intermediate_breaks_commit(tmp_path: Path) -> None:
    base, mid, top = three(tmp_path)
    with mid.open("rb") as reader:
        lock = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)
        fcntl.fcntl(reader, fcntl.F_OFD_SETLK, lock)
        done = subprocess.run(["qemu-img", *commit_argv(base, top)], capture_output=True, text=True)
        assert done.returncode != 0
        assert 'Failed to get shared "consistent read" lock' in done.stderr
    QemuImg().run(commit_argv(base, top))


def test_trap_7_commit_exits_0_although_closing_failed(tmp_path: Path) -> None:
    """No room for the base's bitmap: lost, and exit code 0."""
    if QemuImg().version() >= (8, 0, 0):
        pytest.skip("fixed since")
    lost_with_exit_0 = False
    for clusters in range(1, 6):
        base = create(tmp_path / f"base{clusters}", M)
        qemu_img("bitmap", "--add", "-f", "qcow2", base, "b")
        top = create(tmp_path / f"top{clusters}", M, base.name)
        write(top, "write -P 1 0 64k")
        room = (-(-base.stat().st_size // (64 * K)) + clusters) * 64 * K
        limit = (room, resource.RLIM_INFINITY)
        done = subprocess.run(
            ["qemu-img", *commit_argv(base, top)],
            capture_output=True,
            text=True,
            # A full disk in small: SIGXFSZ, which Python ignores, stays ignored.
            restore_signals=False,
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        )
        lost_with_exit_0 |= done.returncode == 0 and "Lost persistent bitmaps" in done.stderr
    assert lost_with_exit_0


def test_trap_8_a_shorter_top_does_not_truncate_the_base(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 2 * M)
    write(base, "write -P 1 0 2M")
    top = create(tmp_path / "top", M, "base")
    old = content(top)
    QemuImg().run(commit_argv(base, top))
    assert content(base) != old and content(base)[:M] == old
    QemuImg().run(resize_shrink_argv(base, "qcow2", M))
    assert content(base) == old


def test_trap_9_past_the_end_of_a_short_layer_is_zero_not_what_lies_below(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 2 * M)
    write(base, "write -P 1 0 2M")
    create(tmp_path / "mid", M, "base")
    top = create(tmp_path / "top", 2 * M, "mid")
    old = content(top)
    assert old == b"\1" * M + bytes(M)
    # Though mid allocates nothing at all, the pull has a megabyte of zeroes to write.
    qemu_img("rebase", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    assert content(top) == old
    assert sum(int(str(e["length"])) for e in own_map(top)) == M


def test_trap_10_a_v2_target_cannot_grow_over_a_longer_backing(tmp_path: Path) -> None:
    create(tmp_path / "base", 4 * M, image_format="raw")
    write(tmp_path / "base", "write -P 1 0 4M", image_format="raw")
    mid = create(tmp_path / "mid", M, "base", "raw", options="compat=0.10")
    top = create(tmp_path / "top", 2 * M, "mid")
    write(top, "write -P 2 0 64k")
    old = content(top)
    done = subprocess.run(["qemu-img", *commit_argv(mid, top)], capture_output=True, text=True)
    assert done.returncode != 0 and "Operation not supported" in done.stderr
    assert content(top) == old
    qemu_img("amend", "-f", "qcow2", "-o", "compat=1.1", mid)
    QemuImg().run(commit_argv(mid, top))
    assert content(mid) == old
