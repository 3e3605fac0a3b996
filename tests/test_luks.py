"""LUKS images read as qemu-img reads them; without the passphrase, or with what cannot be, refused.

The judge is `qemu-img convert` with the same passphrase.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from fixtures.build import build_chain
from fixtures.oracle import QemuError, qemu_img, raw_of, run_tool
from fixtures.shadow import pattern
from qchain.chain.chain import open_chain
from qchain.chain.digest import digest
from qchain.chain.gate import Gate
from qchain.chain.layer import Qcow2Layer
from qchain.chain.reader import read
from qchain.errors import ExitCode, ImageError, Unsupported
from qchain.hostfile import HostFile
from qchain.qcow2 import luks as module
from qchain.qcow2.header import read_header
from qchain.qcow2.luks import LUKS_HEADER, LuksHeader, SectorCipher, read_luks_header, unlock
from qchain.verify.compare import compare

SECRET = b"correct horse"
ANY = pytest.approx  # readable name for what qemu measures itself


def secret_object(directory: Path, secret: bytes = SECRET) -> list[str]:
    file = directory / f"secret-{hashlib.sha1(secret).hexdigest()[:8]}"
    file.write_bytes(secret)
    return ["--object", f"secret,id=sec0,file={file}"]


def opts(path: Path, backing: str = "") -> str:
    return f"driver=qcow2,encrypt.key-secret=sec0,file.filename={path}{backing}"


def create(
    path: Path,
    options: str = "",
    size: str = "4M",
    backing: tuple[Path, str] | None = None,
    secret: bytes = SECRET,
) -> Path:
    """An encrypted image; the passphrase costs 50 ms to try (less, and qemu cannot measure)."""
    words = f"encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=50{options}"
    below = [] if backing is None else ["-u", "-b", backing[0].name, "-F", backing[1]]
    last: QemuError | None = None
    for _ in range(8):
        try:
            qemu_img("create", "-q", "-f", "qcow2", *secret_object(path.parent, secret), "-o", words,
                     *below, path, size)  # fmt: skip
            return path
        except QemuError as error:
            # On a busy machine qemu fails to measure how fast it is.
            if "accurate CPU usage" not in str(error):
                raise
            last = error
    assert last is not None
    raise last


def qio(path: Path, *commands: str) -> None:
    """qemu-io on an encrypted image."""
    argv: list[str | Path] = ["qemu-io", *secret_object(path.parent), "--image-opts"]
    for command in commands:
        argv += ["-c", command]
    done = run_tool([*argv, opts(path)], cwd=path.parent)
    assert not done.stdout + done.stderr, done


def write(path: Path, runs: Sequence[tuple[str, int, int]]) -> bytes:
    """Write (letter, start, length) patterns; returns nothing qchain made."""
    for letter, start, length in runs:
        (path.parent / f"p{letter}{start}").write_bytes(pattern(letter, start, length))
    qio(path, *(f"write -q -s p{letter}{start} {start} {length}" for letter, start, length in runs))
    return b""


def judged(path: Path, secret: bytes = SECRET, extra: str = "") -> bytes:
    """The content as qemu-img reads it with the passphrase."""
    raw = path.parent / f"{path.name}.judged"
    qemu_img("convert", *secret_object(path.parent, secret), "--image-opts", "-O", "raw",
             opts(path, extra), raw)  # fmt: skip
    return raw.read_bytes()


def ours(path: Path, secret: bytes | None = SECRET, **options: str) -> bytes:
    with open_chain(path, Gate(secret=secret), **options) as chain:
        return read(chain.layers, 0, chain.size)


def header_of(path: Path) -> LuksHeader:
    with HostFile(path) as file:
        found = read_luks_header(file, read_header(file))
    assert found is not None
    return found


RUNS = [("A", 0, 1 << 16), ("B", 3 << 20, 200 << 10), ("C", 70 << 10, 512), ("D", 1 << 20, 65536)]
VARIANTS = {
    "default": "",
    "aes-128": "cipher-alg=aes-128",
    "aes-192": "cipher-alg=aes-192",
    "xts plain": "ivgen-alg=plain",
    "xts essiv": "ivgen-alg=essiv",
    "cbc": "cipher-mode=cbc",
    "cbc essiv": "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    "cbc essiv md5": "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5",
    "cbc plain": "cipher-mode=cbc,ivgen-alg=plain,cipher-alg=aes-128",
    "ctr": "cipher-mode=ctr",
    "ctr essiv": "cipher-mode=ctr,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    "ecb": "cipher-mode=ecb",
    "sha1": "hash-alg=sha1",
    "sha224": "hash-alg=sha224",
    "sha384": "hash-alg=sha384",
    "sha512": "hash-alg=sha512",
    "md5": "hash-alg=md5",
    "ripemd160": "hash-alg=ripemd160",
}


def options_of(text: str) -> str:
    return "".join(f",encrypt.{word}" for word in text.split(",") if word)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_cipher_that_qemu_img_makes(name: str, tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", options_of(VARIANTS[name]))
    write(image, RUNS)
    expected = judged(image)
    assert expected[3 << 20 : (3 << 20) + (200 << 10)] == pattern("B", 3 << 20, 200 << 10)
    assert ours(image) == expected
