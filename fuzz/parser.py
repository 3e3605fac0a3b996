"""The header and what hangs on it under Atheris, which learns from coverage: `make fuzz` runs it
for a minute where the package `atheris` is installed; alone:

    python -m fuzz.parser [-max_total_time=600] [libFuzzer's options] [CORPUS]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found,unused-ignore]

from fixtures.shapes import build_shapes

with atheris.instrument_imports(include=["qchain"]):
    from fuzz.probe import probe

_file = os.memfd_create("image")
_path = Path(f"/proc/self/fd/{_file}")
_LARGEST = 160 << 10
_BEGINNING = b"QFI\xfb\0\0\0"
"""The magic and most of the version: to guess them would take all the time."""


def one(data: bytes) -> None:
    """Read `data` as an image. What it raises is the find: Atheris keeps the input."""
    os.ftruncate(_file, 0)
    os.pwrite(_file, _BEGINNING + data, 0)
    probe(_path, 7)


def _corpus() -> Path:
    """Small images to begin with, made once."""
    place = Path("build/corpus")
    if not place.is_dir():
        shapes = build_shapes()
        place.mkdir(parents=True)
        for shape in shapes:
            raw = shape.files[shape.active]
            if len(raw) <= _LARGEST:
                (place / shape.name.replace(" ", "-")).write_bytes(raw[len(_BEGINNING) :])
    return place


def main() -> None:
    finds = Path("build/finds")
    finds.mkdir(parents=True, exist_ok=True)
    # 2 s and 300 MiB, as everywhere.
    limits = ["-timeout=2", "-malloc_limit_mb=300", "-rss_limit_mb=1024", f"-max_len={_LARGEST}"]
    argv = [sys.argv[0], *limits, f"-artifact_prefix={finds}/", *sys.argv[1:]]
    if all(word.startswith("-") for word in sys.argv[1:]):
        argv.append(str(_corpus()))
    atheris.Setup(argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
