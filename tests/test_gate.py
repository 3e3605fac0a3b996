"""The open gate: an image never decides which files are opened."""

from __future__ import annotations

import errno
import itertools
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fixtures.build import build_chain
from fixtures.oracle import qemu_img, raw_of
from qchain.chain.chain import FormatNotRecorded, open_chain
from qchain.chain.gate import Gate, Places
from qchain.chain.reader import read
from qchain.chain.scan import overlays_in
from qchain.errors import ExitCode, ImageError, NotAllowed, QchainError, Unsupported, UsageError


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "a refused chain leaves files open"


def image(
    path: Path, backing: str | None = None, fmt: str | None = "qcow2", size: str = "1M"
) -> Path:
    """An image that records whatever backing name is asked for; nothing need be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    qemu_img("create", "-q", "-f", "qcow2", path, size)
    if backing is not None:
        rename_backing(path, backing, fmt)
    return path


def rename_backing(path: Path, backing: str, fmt: str | None) -> None:
    """Record a backing name by hand: qemu-img would follow some. Version 3, 64K clusters."""
    extension = b""
    if fmt is not None:
        word = fmt.encode()
        extension = (0xE2792ACA).to_bytes(4, "big") + len(word).to_bytes(4, "big")
        extension += word.ljust(-(-len(word) // 8) * 8, b"\0")
    name = os.fsencode(backing)
    with path.open("r+b") as file:
        file.seek(104)
        assert file.write(bytes(2000)) == 2000
        file.seek(104)
        file.write(extension + bytes(8) + name)
        file.seek(8)
        file.write((104 + len(extension) + 8).to_bytes(8, "big") + len(name).to_bytes(4, "big"))
        file.seek(100)
        file.write((104).to_bytes(4, "big"))


def refused(path: Path, gate: Gate | None = None, kind: type[QchainError] = ImageError) -> str:
    """The one line that opening the chain fails with: never a traceback, always exit code 4."""
    with pytest.raises(kind) as caught:
        open_chain(path, gate).close()
    text = str(caught.value)
    assert text.isprintable(), text
    assert caught.value.exit_code == ExitCode.INVALID
    return text


def opens(path: Path, gate: Gate | None = None) -> list[Path]:
    with open_chain(path, gate) as chain:
        return [layer.path for layer in chain.layers]


# --- where a file may lie -------------------------------------------------------------------


def test_own_directory_is_allowed(tmp_path: Path) -> None:
    image(tmp_path / "a")
    assert opens(image(tmp_path / "b", "a")) == [tmp_path / "b", tmp_path / "a"]
    assert opens(image(tmp_path / "c", str(tmp_path / "b"))) == [
        tmp_path / name for name in ("c", "b", "a")
    ]


@pytest.mark.parametrize(
    "name", ["../base", "sub/base", "ABSOLUTE", "../x/../base", "sub/../../base"]
)
def test_outside_is_refused(name: str, tmp_path: Path) -> None:
    """Naming the file and the flag that would allow it; each flag then does."""
    own = tmp_path / "own"
    (own / "sub").mkdir(parents=True)
    (tmp_path / "x").mkdir()
    for where in (tmp_path, own / "sub"):
        image(where / "base")
    given = str(tmp_path / "base") if name == "ABSOLUTE" else name
    top = image(own / "top", given)
    text = refused(top, kind=NotAllowed)
    assert str(own / given if name != "ABSOLUTE" else given) in text
    assert "--allow" in text
    assert "--follow" in text
    # The flag it advises is enough, even as it stands in the message.
    advised = Path(shlex.split(text.split("--allow ")[1])[0])
    assert len(opens(top, Gate(allow=(advised,)))) == 2
    assert len(opens(top, Gate(allow=(tmp_path,)))) == 2
    assert len(opens(top, Gate(follow=True))) == 2
    refused(top, Gate(allow=(tmp_path / "x",)), NotAllowed)


def test_allow_is_not_a_prefix_of_names(tmp_path: Path) -> None:
    image(tmp_path / "poolside" / "base")
    (tmp_path / "pool").mkdir()
    top = image(tmp_path / "own" / "top", "../poolside/base")
    refused(top, Gate(allow=(tmp_path / "pool",)), NotAllowed)
    assert len(opens(top, Gate(allow=(tmp_path / "poolside",)))) == 2


def test_own_is_that_of_the_image_named_not_of_each_layer(tmp_path: Path) -> None:
    """Being let into one directory by a flag does not let in what lies beside."""
    image(tmp_path / "c" / "base")
    image(tmp_path / "b" / "middle", "../c/base")
    top = image(tmp_path / "a" / "top", "../b/middle")
    text = refused(top, Gate(allow=(tmp_path / "b",)), NotAllowed)
    assert "c/base" in text
    assert len(opens(top, Gate(allow=(tmp_path / "b", tmp_path / "c")))) == 3


def test_outside_is_not_even_looked_at(tmp_path: Path) -> None:
    """The same refusal whether the file is there or not, and it is never opened."""
    top = image(tmp_path / "own" / "top", "../secret")
    absent = refused(top, kind=NotAllowed)
    secret = image(tmp_path / "secret")
    os.utime(secret, (1000, 1000))
    assert refused(top, kind=NotAllowed) == absent
    assert secret.stat().st_atime == 1000


def test_symbolic_links_are_judged_by_where_they_lead(tmp_path: Path) -> None:
    own = tmp_path / "own"
    image(tmp_path / "base")
    top = image(own / "top", "link")
    (own / "link").symlink_to("../base")
    assert "own/link" in refused(top, kind=NotAllowed)
    assert len(opens(top, Gate(allow=(tmp_path,)))) == 2
    # A name outside that leads inside is fine, and so is a link to a link.
    image(own / "inside")
    (tmp_path / "hop").symlink_to("own/inside")
    (own / "link").unlink()
    (own / "link").symlink_to("../hop")
    assert len(opens(top)) == 2
    # A link as directory.
    (own / "dir").symlink_to("..")
    refused(image(own / "top2", "dir/base"), kind=NotAllowed)
    # An allowed directory may be named through a link.
    (tmp_path / "pool").mkdir()
    (tmp_path / "alias").symlink_to("pool")
    image(tmp_path / "pool" / "base")
    assert len(opens(image(own / "top3", "../pool/base"), Gate(allow=(tmp_path / "alias",)))) == 2


def test_places_are_real_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked in any order, whatever is known of the directories already."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    for name, target in {
        "a/up": "..", "a/b/self": "self", "a/b/there": "../back", "a/back": "b/there",
        "dir": "a/b", "a/b/hop": "../../dir/file", "a/none": "nowhere/at/all", "a/root": "/",
    }.items():  # fmt: skip
        (tmp_path / name).symlink_to(target)
    tails = ["", ".", "..", "file", "self", "there", "hop", "none", "up", "n" * 300, "file/x"]
    heads = ["", "a", "a/b", "dir", "a/up", "a/b/..", "dir/../b", "a/root/tmp", "a/b/self", "a//b"]
    monkeypatch.chdir(tmp_path)
    for base in (tmp_path, Path()):
        places = Places()
        for head, tail in itertools.product(heads, tails * 2):
            path = base / head / tail
            assert places.real(path) == os.path.realpath(path)


def test_active_image_by_symbolic_link(tmp_path: Path) -> None:
    """Its name's directory and its real one are both its own; names count from its name's."""
    image(tmp_path / "real" / "base")
    image(tmp_path / "real" / "top", "base")
    (tmp_path / "names").mkdir()
    link = tmp_path / "names" / "top"
    link.symlink_to("../real/top")
    assert "names/base" in refused(link)
    (tmp_path / "names" / "base").symlink_to("../real/base")
    assert opens(link) == [link, tmp_path / "names" / "base"]


def test_relative_name_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image(tmp_path / "base")
    image(tmp_path / "top", "base")
    image(tmp_path / "other", "../base")
    monkeypatch.chdir(tmp_path)
    assert len(opens(Path("top"))) == 2
    refused(Path("other"), kind=NotAllowed)


def test_data_file_passes_the_gate_too(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 65536)
    own = tmp_path / "own"
    own.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", own / "top", "64k")
    assert "data" in refused(own / "top", kind=NotAllowed)
    assert len(opens(own / "top", Gate(allow=(tmp_path,)))) == 1
    (tmp_path / "data").unlink()
    os.mkfifo(tmp_path / "data")
    refused(own / "top", Gate(allow=(tmp_path,)))


# --- chains that go nowhere -----------------------------------------------------------------


def test_missing(tmp_path: Path) -> None:
    top = image(tmp_path / "top", "gone")
    text = refused(top)
    assert str(tmp_path / "gone") in text
    assert "missing" in text
    assert str(top) in text
    assert "no such file" in refused(tmp_path / "nothing")
    (tmp_path / "gone").symlink_to("nowhere")
    assert "missing" in refused(top)


LOOPS = {
    "self": [("top", "top")],
    "two": [("top", "other"), ("other", "top")],
    "hard link": [("top", "twin")],
    "symbolic link": [("top", "twin")],
    # The loop does not come back to the top.
    "three": [("top", "a"), ("a", "b"), ("b", "./a")],
}


@pytest.mark.parametrize("how", LOOPS)
def test_loops(how: str, tmp_path: Path) -> None:
    top = tmp_path / "top"
    for name, backing in LOOPS[how]:
        image(tmp_path / name, backing)
    if how == "hard link":
        (tmp_path / "twin").hardlink_to(top)
    elif how == "symbolic link":
        (tmp_path / "twin").symlink_to("top")
    # The image whose backing name closes the loop, that name, and where it leads.
    culprit, name = LOOPS[how][-1]
    back = {"two": str(top), "three": str(tmp_path / "a")}.get(how, "itself")
    for gate in (Gate(), Gate(follow=True)):
        said = refused(top, gate)
        assert f"{tmp_path / culprit}: the chain loops: its backing name '{name}'" in said
        assert f"leads back to {back}" in said


def test_symbolic_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "knot").symlink_to("knot")
    refused(tmp_path / "knot")
    refused(image(tmp_path / "top", "knot"))


def test_too_deep(tmp_path: Path) -> None:
    image(tmp_path / "0")
    for index in range(1, 6):
        (tmp_path / str(index)).write_bytes((tmp_path / "0").read_bytes())
        rename_backing(tmp_path / str(index), str(index - 1), "qcow2")
    assert len(opens(tmp_path / "5", Gate(max_depth=6))) == 6
    assert "deeper than 5" in refused(tmp_path / "5", Gate(max_depth=5))


def test_a_thousand_layers(tmp_path: Path) -> None:
    """More layers than a process usually may have open files."""
    image(tmp_path / "0")
    content = (tmp_path / "0").read_bytes()
    for index in range(1, 1300):
        (tmp_path / str(index)).write_bytes(content)
        rename_backing(tmp_path / str(index), str(index - 1), "qcow2")
    script = (
        "import resource, sys; from pathlib import Path\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))\n"
        "from qchain.chain.chain import open_chain\n"
        "print(len(open_chain(Path(sys.argv[1])).layers))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "1299")], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == "1300\n"


def test_format_not_recorded(tmp_path: Path) -> None:
    """Never probed: what looks like qcow2 may be the content of a raw guest disk."""
    image(tmp_path / "base")
    top = image(tmp_path / "top", "base", fmt=None)
    text = refused(top, kind=FormatNotRecorded)
    assert str(top) in text
    assert "--assume-format" in text
    with open_chain(top, Gate(assume_format="raw")) as chain:
        assert [layer.format for layer in chain.layers] == ["qcow2", "raw"]
        assert read(chain.layers, 0, 4) == b"QFI\xfb"
    with open_chain(top, Gate(assume_format="qcow2")) as chain:
        assert [layer.format for layer in chain.layers] == ["qcow2", "qcow2"]


def test_recorded_format_is_obeyed(tmp_path: Path) -> None:
    """A guest that writes a qcow2 header into its raw disk gains nothing by it."""
    evil = image(tmp_path / "evil", "../secret")
    with open_chain(image(tmp_path / "top", "evil", fmt="raw")) as chain:
        assert chain.layers[1].format == "raw"
        assert read(chain.layers, 0, 4) == evil.read_bytes()[:4] == b"QFI\xfb"
    refused(image(tmp_path / "top2", "evil", fmt="vmdk"), kind=Unsupported)
    (tmp_path / "text").write_bytes(b"no image at all".ljust(65536))
    refused(image(tmp_path / "top3", "text", fmt="qcow2"))


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "nbd://host/disk", "nbd:unix:/run/sock", "http://host/x", "https://host/x", "ssh://h/x",
        "fat:rw:/etc", "blkdebug:cfg:base", "rbd:pool/image", "iscsi://h/t/0", "fd:base",
        "a:b", ":base", "host_device:/dev/sda", "FILE:/etc/passwd", "file:", "file:base",
        "file:../base",
    ],
)  # fmt: skip
def test_protocol_names(name: str, tmp_path: Path) -> None:
    for existing in ("base", name.replace("/", "_")):
        image(tmp_path / existing)
    text = refused(image(tmp_path / "top", name), Gate(follow=True), Unsupported)
    assert str(tmp_path / "top") in text


def test_names_that_only_look_like_protocols(tmp_path: Path) -> None:
    image(tmp_path / "a:b")
    assert len(opens(image(tmp_path / "top", "./a:b"))) == 2
    assert len(opens(image(tmp_path / "top2", str(tmp_path / "a:b")))) == 2
    assert len(opens(image(tmp_path / "top3", f"file:{tmp_path}/a:b"))) == 2
    # Found by its path like any other name, so outside is outside.
    refused(image(tmp_path / "own" / "top", f"file:{tmp_path}/a:b"), kind=NotAllowed)


@pytest.mark.parametrize(
    "name",
    [
        "json:", "json:{", "json:[]", "json:null", "json:{}", 'json:{"driver": "nbd"}',
        'json:{"driver": "qcow2"}', 'json:{"driver":"raw","file":{"driver":"nbd","host":"h"}}',
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"base"}}',
        'json:{"driver":"qcow2","file":{"driver":"file","filename":5}}',
        'json:{"driver":"qcow2","file":{"driver":"file"}}', 'json:{"driver":"qcow2","file":"node"}',
        'json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"DIR/base"}}',
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"DIR/base"},"backing":null}',
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"DIR/base"},"data-file":{}}',
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"DIR/base","pr-manager":"x"}}',
        'json:{"driver":"raw","file":{"driver":"file","filename":"DIR/base"}}',
        'json:{"driver":["qcow2"],"file":{"driver":"file","filename":"DIR/base"}}',
        'json:{"driver":"qcow2","file":{"driver":["file"],"filename":"DIR/base"}}',
        'json:{"driver":{"x":1},"file":{"driver":"file","filename":"DIR/base"}}',
        'json:{"driver":"qcow2","file":{"driver":"file","filename":""}}',
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"/a\\u0000b"}}',
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"/\\ud800"}}',
        'json:{"driver":"qcow2","driver":"raw","file":{"driver":"file","filename":"DIR/base"}}',
        "json:" + "[" * 900, "json:" + '{"a":' * 150 + "1" + "}" * 150, "json:NaN", "json:1e999",
        "json:" + "9" * 900,
    ],
)  # fmt: skip
def test_json_names_that_are_refused(name: str, tmp_path: Path) -> None:
    image(tmp_path / "base")
    top = image(tmp_path / "top", name.replace("DIR", str(tmp_path)))
    refused(top, Gate(follow=True))


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"DIR/base"}}',
        'json:{"driver":"qcow2","file.driver":"file","file.filename":"DIR/base"}',
        'json:{"driver":"qcow2","file":{"filename":"DIR/base"}}',
        'json:{"driver":"file","filename":"DIR/base"}',
        'json:{"file":{"driver":"file","filename":"DIR/base","cache":{"direct":true}},"driver":"qcow2"}',
    ],
)  # fmt: skip
def test_json_names_of_local_files(name: str, tmp_path: Path) -> None:
    image(tmp_path / "base")
    text = name.replace("DIR", str(tmp_path))
    assert opens(image(tmp_path / "top", text))[1] == tmp_path / "base"
    refused(image(tmp_path / "own" / "top", text), kind=NotAllowed)


@pytest.mark.parametrize(
    "name",
    ["new\nline", "\x1b[2Jescape", "blank name", "-rf", "quote'\"$(x)`", "ünï", "\u202eltr", "a,b",
     "\udcff\udcfe", "tab\tand\rreturn", "x" * 255],
)  # fmt: skip
def test_odd_names(name: str, tmp_path: Path) -> None:
    """They open like others; missing or not allowed, the message stays one harmless line."""
    top = image(tmp_path / "top", name)
    refused(top)
    image(tmp_path / name)
    assert opens(top) == [top, tmp_path / name]
    assert len(opens(image(tmp_path / name, None))) == 1
    if len(name) < 250:
        outside = image(tmp_path / "own" / "top", f"../{name}")
        refused(outside, kind=NotAllowed)
        assert len(opens(outside, Gate(allow=(tmp_path,)))) == 2


@pytest.mark.parametrize("name", ["x" * 256, "x" * 1023, "/" * 1023, "b/" * 511])
def test_impossible_names(name: str, tmp_path: Path) -> None:
    image(tmp_path / "a")
    refused(image(tmp_path / "top", name))
    refused(image(tmp_path / "top", name), Gate(follow=True))
    refused(image(tmp_path / "top", name), Gate(search=(tmp_path,)))


@pytest.mark.parametrize("spelt", ["\\u0000", "/x\\u0000y", "/\\ud800", "/x/\\udfff"])
def test_names_that_only_json_can_spell(spelt: str, tmp_path: Path) -> None:
    """A NUL, half of a surrogate pair: found by fuzzing, as errors of Python's own."""
    chain = build_chain(tmp_path, ["64k:A", "64k:-"])
    name = f'json:{{"driver":"qcow2","file.filename":"{spelt}"}}'
    raw = bytearray(chain.active.read_bytes())
    raw[1024 : 1024 + len(name)] = name.encode()
    raw[8:20] = (1024).to_bytes(8, "big") + len(name).to_bytes(4, "big")
    chain.active.write_bytes(raw)
    for gate in (Gate(), Gate(follow=True), Gate(search=(tmp_path,))):
        with pytest.raises(ImageError, match="not a possible file name"):
            open_chain(chain.active, gate)


def test_a_scan_passes_over_links_in_a_circle(tmp_path: Path) -> None:
    """Whatever else lies in the directory of an image: found by fuzzing."""
    chain = build_chain(tmp_path, ["64k:A", "64k:B"])
    (tmp_path / "circle").symlink_to("circle")
    assert [found.path for found in overlays_in([tmp_path])] == [chain.active]


def test_a_name_ends_at_its_first_nul(tmp_path: Path) -> None:
    """As to qemu, which holds it in a C string: what we open is what qemu would."""
    built = build_chain(tmp_path, ["64k:A", "[size=64k]"], names=["a", "top"])
    for name in ("a.qcow2\0b", "\0a.qcow2", "a.qcow2\0"):
        rename_backing(built.active, name, "qcow2")
        with open_chain(built.active) as chain:
            assert len(chain.layers) == 1 + (name[0] != "\0")
            assert read(chain.layers, 0, 65536) == raw_of(built.active)


# --- what is no image file ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "socket"])
@pytest.mark.parametrize("role", ["image", "backing", "link"])
def test_not_a_file(kind: str, role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at once: opening a FIFO would wait for ever, a device could do anything."""
    thing = tmp_path / "thing"
    if kind == "fifo":
        os.mkfifo(thing)
    elif kind == "directory":
        thing.mkdir()
    elif kind == "device":
        thing = Path("/dev/zero")
    else:
        monkeypatch.chdir(tmp_path)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("thing")
    if role == "image":
        refused(thing)
        return
    name = str(thing)
    if role == "link":
        (tmp_path / "link").symlink_to(thing)
        name = "link"
    for fmt in ("raw", "qcow2"):
        text = refused(image(tmp_path / f"top-{fmt}", name, fmt), Gate(follow=True))
        assert "missing" not in text


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is played."""
    top = image(tmp_path / "top", "base")
    image(tmp_path / "base")
    plain_open = os.open

    def deny(path: str | Path, *rest: int) -> int:
        if Path(path).name == "base":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return plain_open(path, *rest)

    monkeypatch.setattr(os, "open", deny)
    assert "permission denied" in refused(top)


# --- search and missing ---------------------------------------------------------------------


def test_search(tmp_path: Path) -> None:
    """Missing or outside: looked for by its file name; what is found there may be opened."""
    top = image(tmp_path / "own" / "top", "/var/lib/images/base.qcow2")
    refused(top, kind=NotAllowed)
    found = image(tmp_path / "evidence" / "base.qcow2")
    gate = Gate(search=(tmp_path / "nothing", tmp_path / "evidence"))
    assert opens(top, gate) == [top, found]
    # Only files in it: neither what lies below, nor where its links lead.
    found.unlink()
    image(tmp_path / "evidence" / "sub" / "base.qcow2")
    refused(top, gate)
    image(tmp_path / "elsewhere" / "base.qcow2")
    found.symlink_to("../elsewhere/base.qcow2")
    refused(top, gate)
    # A name that is all dots never escapes.
    refused(image(tmp_path / "own" / "top2", "/x/.."), gate)


def test_missing_may_read_as_zeroes(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["64k:A 64k:B", "[cluster=4k] 4k:C"])
    built.base.unlink()
    with open_chain(built.active, Gate(missing_zero=True)) as chain:
        assert chain.missing == built.base
        assert len(chain.layers) == 1
        content = read(chain.layers, 0, chain.size)
    assert content[:4096].count(b"C") and content[4096:] == bytes(131072 - 4096)
    # What is there and broken is not missing.
    built.base.write_bytes(b"QFI\xfb" + bytes(100))
    refused(built.active, Gate(missing_zero=True))
    built.base.unlink()
    os.mkfifo(built.base)
    refused(built.active, Gate(missing_zero=True))


class Named:
    """A path that is neither a string nor a Path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, Named])
def test_names_of_every_kind(tmp_path: Path, kind: Callable[[Path], str]) -> None:
    base = image(tmp_path / "elsewhere" / "base.qcow2")
    top = image(tmp_path / "here" / "top.qcow2", str(base))
    with pytest.raises(NotAllowed):
        open_chain(kind(top))
    lost = image(tmp_path / "here" / "lost.qcow2", "/gone/base.qcow2")
    for overlay, gate in (
        (top, Gate(allow=(kind(base.parent),))),
        (lost, Gate(search=(kind(base.parent),))),
    ):
        with open_chain(kind(overlay), gate) as chain:
            assert [layer.path for layer in chain.layers] == [overlay, base]
    with pytest.raises(UsageError, match="one name"):
        Gate(allow=str(tmp_path))  # type: ignore[arg-type]
