"""`qchain report`: the page in a real browser, and hostile names that stay text."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cli_runner import command, run

from fixtures.build import build_chain
from fixtures.evidence import build_evidence
from fixtures.oracle import qemu_img, qemu_info, raw_of

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")

HOSTILE = (
    "<script>document.title='owned'<&script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "'onload='alert(1)' &amp;&lt;",
    "</title><style>body{display:none}",
    "line\nfeed\x1b[31m \u202egnp.exe",
)


@dataclass
class Page(HTMLParser):
    """What a browser would make of a page: elements, attributes, text."""

    source: str
    tags: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "dl", "dt", "dd", "code"),
    *(
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "svg",
        "g",
        "rect",
        "path",
        "text",
        "tspan",
    ),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "viewbox", "role"),
    *("aria-label", "d", "x", "y", "width", "height", "rx"),
}


@dataclass(frozen=True)
class Shown:
    """A page as the browser showed it. `pixels`: shape (height, width, 3)."""

    pixels: npt.NDArray[np.uint8]
    console: list[str]
    requests: set[str]
    dom: str


def show(page: Path, scratch: Path, dark: bool = False) -> Shown:
    """Open a page in headless Chromium, cut off from any network."""
    assert BROWSER is not None
    scratch.mkdir()
    shot, log = scratch / "shot.png", scratch / "net.json"
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={scratch / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            *("--hide-scrollbars", "--window-size=900,1000", f"--screenshot={shot}"),
            *("--dump-dom", "--enable-logging=stderr", f"--log-net-log={log}", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    text = log.read_text()
    events = json.loads(text if text.rstrip().endswith("}") else text.rstrip().rstrip(",") + "]}")
    urls = {event.get("params", {}).get("url", "") for event in events["events"]}
    return Shown(
        decode_png(shot.read_bytes()),
        [line for line in done.stderr.splitlines() if "CONSOLE" in line],
        {url for url in urls if url.startswith(("http", "ws", "ftp")) and "google" not in url},
        done.stdout,
    )


def decode_png(data: bytes) -> npt.NDArray[np.uint8]:
    """Shape (height, width, 3) of an 8-bit RGB or RGBA picture that is not interlaced."""
    position, packed = 8, b""
    width = height = channels = 0
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, *_, interlace = struct.unpack(">IIBBBBB", body)
            assert depth == 8 and interlace == 0
            channels = {2: 3, 6: 4}[colour]
        packed += body if kind == b"IDAT" else b""
        position += length + 12
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * channels)
    out = np.zeros((height, width * channels), np.uint8)
    above = np.zeros(width * channels, np.uint8)
    for row in range(height):
        out[row] = above = unfilter(lines[row, 0], lines[row, 1:], above, channels)
    return out.reshape(height, width, channels)[:, :, :3]


def unfilter(
    kind: int, line: npt.NDArray[np.uint8], above: npt.NDArray[np.uint8], step: int
) -> npt.NDArray[np.uint8]:
    if kind == 0:
        return line.copy()
    if kind == 2:
        return line + above
    out, up = line.tolist(), above.tolist()
    for at in range(len(out)):
        left = out[at - step] if at >= step else 0
        corner = up[at - step] if at >= step else 0
        if kind == 1:
            guess = left
        elif kind == 3:
            guess = (left + up[at]) // 2
        else:
            p = left + up[at] - corner
            guess = min((left, up[at], corner), key=lambda each: abs(p - each))
        out[at] = (out[at] + guess) & 255
    return np.array(out, np.uint8)


def hostile_chain(directory: Path) -> Path:
    names = [f"{name}.qcow2".replace("/", "|") for name in HOSTILE]
    layers = ["4M:A", "1M:B 1M:-", "2M:- 1M:c", "64k:0", "3M:- 64k:E"]
    # Relative, a name with a colon would be one of a network protocol.
    built = build_chain(directory, layers, names, "absolute")
    qemu_img("snapshot", "-c", HOSTILE[1], built.active)
    qemu_img("bitmap", "--add", "-f", "qcow2", built.active, HOSTILE[0])
    return built.active


def report_on(image: Path, output: Path, *more: str) -> str:
    result = command("report", *more, image, "-o", output)
    assert result.code == 0, result.err
    return output.read_text("ascii")


@needs_browser
def test_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    source = report_on(hostile_chain(tmp_path / "chain"), page)
    light = show(page, tmp_path / "light")
    dark = show(page, tmp_path / "dark", dark=True)
    for shown in (light, dark):
        assert shown.console == [] and shown.requests == set()
        colours = np.unique(shown.pixels.reshape(-1, 3), axis=0)
        assert len(colours) > 50  # text and pictures, not an empty page
        background = shown.pixels[0, 0]
        inked = (shown.pixels != background).any(axis=2)
        assert inked.any(axis=1).mean() > 0.4 and inked.mean() > 0.05
    assert light.pixels[0, 0].mean() > 200 > 60 > dark.pixels[0, 0].mean()
    # The mark of what is owned is drawn, in the colour of each scheme.
    assert (light.pixels == (0x1F, 0x6F, 0xA8)).all(axis=2).sum() > 5000
    assert (dark.pixels == (0x5C, 0xB3, 0xEC)).all(axis=2).sum() > 5000
    # What the browser made of it holds no element that the page has not.
    dom = Page(light.dom)
    assert dom.tags <= ELEMENTS and dom.tags == Page(source).tags
    assert "<title>line\\nfeed" in light.dom and "owned</title>" not in light.dom


@needs_browser
def test_the_browser_test_would_notice(tmp_path: Path) -> None:
    """A page that does load, log and run something: the checks above are able to fail."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<p>x<img src='http://127.0.0.1:9/x.png'><script>console.error('seen')</script>"
    )
    shown = show(page, tmp_path / "bad")
    assert any("seen" in line for line in shown.console)
    assert shown.requests == {"http://127.0.0.1:9/x.png"}
    assert "script" in Page(shown.dom).tags


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    source = report_on(hostile_chain(tmp_path / "chain"), tmp_path / "r.html")
    page = Page(source)
    assert page.tags <= ELEMENTS and page.attributes <= ATTRIBUTES
    text = "".join(page.text)
    for name in HOSTILE[:4]:
        assert name.replace("/", "|") in text
    assert "line\\nfeed\\x1b[31m \\u202egnp.exe" in text
    assert "http:" not in source and "https:" not in source and "url(" not in source
    assert "default-src 'none'" in source


def test_what_it_says(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["[raw] 4M:A", "1M:B", "[size=6M] 2M:- 1M:c"])
    qemu_img("snapshot", "-c", "before-update", built.active)
    qemu_img("bitmap", "--add", "-f", "qcow2", "-g", "32768", built.active, "backup-1")
    output = tmp_path / "r.html"
    text = "\n".join(Page(report_on(built.active, output)).text)
    point = hashlib.sha256(raw_of(built.active)).hexdigest()
    assert point in text
    for path in built.paths:
        assert path.name in text
        assert hashlib.sha256(path.read_bytes()).hexdigest() in text
    snapshot = qemu_info(built.active)["snapshots"][0]
    assert "before-update" in text and snapshot["id"] in text
    assert "backup-1" in text and "32.0 KiB" in text
    assert command("--version").out.strip() in text
    assert shlex.join(["qchain", "report", str(built.active), "-o", str(output)]) in text
    assert "None was found." in text


def test_problems_are_told(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["256k:A", "256k:B"])
    with built.active.open("r+b") as stream:
        stream.seek(0, os.SEEK_END)
        leaked = stream.tell()
        (table,) = struct.unpack(">Q", pread(built.active, 48, 8))
        (block,) = struct.unpack(">Q", pread(built.active, table, 8))
        stream.write(bytes(65536))
        stream.seek(block + 2 * (leaked // 65536))
        stream.write(b"\0\1")
        stream.seek(block + 2 * 5)
        stream.write(b"\0\0")
    later = built.base.stat().st_mtime + 7200
    os.utime(built.base, (later, later))
    text = "".join(Page(report_on(built.active, tmp_path / "r.html")).text)
    assert "only space is lost" in text
    assert "Host clusters are used more often than counted" in text
    assert "was written at" in text and "None was found." not in text


def pread(path: Path, offset: int, length: int) -> bytes:
    return path.read_bytes()[offset : offset + length]


def test_what_nothing_refers_to_is_told(tmp_path: Path) -> None:
    evidence = build_evidence(tmp_path / "e")
    output = tmp_path / "r.html"
    text = "\n".join(Page(report_on(evidence.active, output, "--search", str(tmp_path / "e"))).text)
    for word in ("leaked", "free", "slack", "Portable Network", "ZIP archive", "curl -sO http"):
        assert word in text, word
    assert "is recorded as /var/lib/libvirt/images/server.qcow2" in text
    assert "note" in text and "warning" not in text.replace("Problems, warnings", "")
    output.unlink()
    more = ("--search", str(tmp_path / "e"), "--no-digests")
    text = "\n".join(Page(report_on(evidence.active, output, *more)).text)
    assert "not looked at" in text and "curl" not in text


def test_a_missing_base_is_in_the_picture(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["256k:A", "64k:B"])
    built.base.unlink()
    output = tmp_path / "r.html"
    source = report_on(built.active, output, "--missing", "zero")
    assert '<rect class="missing"' in source
    text = "\n".join(Page(source).text)
    assert "missing, taken for zeroes (--missing zero)" in text and "1 warning, see below" in text


def test_a_data_file_has_its_digest(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["[datafile] 64k:A 64k:-"])
    data = built.active.with_name(built.active.name + ".data")
    text = "\n".join(Page(report_on(built.active, tmp_path / "r.html")).text)
    assert hashlib.sha256(data.read_bytes()).hexdigest() in text and data.name in text


def test_without_digests(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["256k:A", "256k:B"])
    output = tmp_path / "r.html"
    result = run("report", "--json", "--no-digests", built.active, "-o", output)
    assert result.json == {
        "output": str(output),
        "layers": 2,
        "problems": 0,
        "warnings": [],
        "digest": None,
    }
    assert "Not made." in output.read_text()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["256k:A", "256k:B"])
    before = built.base.read_bytes()
    run("report", built.active, "-o", built.base).fails(3)
    assert built.base.read_bytes() == before


def test_many_layers(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["64k:A", *(["64k:B"] * 15)])
    source = report_on(built.active, tmp_path / "r.html", "--no-digests")
    text = "\n".join(Page(source).text)
    assert "5 more images" in text and "l13.qcow2" in text
    assert len(source) < 200_000


def test_an_empty_disk(tmp_path: Path) -> None:
    built = build_chain(tmp_path, ["[size=0]"])
    assert "A chain of 1 image, a disk of" in report_on(built.active, tmp_path / "r.html")
