"""The header and what hangs on it under Atheris, which learns from coverage: `make fuzz` runs it
for a minute where the package `atheris` is installed; alone:

    python -m fuzz.parser [-max_total_time=600] [libFuzzer's options] [CORPUS]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found,unused-ignore]

with atheris.instrument_imports(include=["qchain"]):
    from fuzz.probe import probe

_file = os.memfd_create("image")
_path = Path(f"/proc/self/fd/{_file}")
_LARGEST = 1 << 20


def one(data: bytes) -> None:
    """Read `data` as an image. What it raises is the find: Atheris keeps the input."""
    data = b"QFI\xfb\0\0\0" + data[:_LARGEST]
    os.ftruncate(_file, 0)
    os.pwrite(_file, data, 0)
    probe(_path, 0)


def main() -> None:
    # The fixed part is left out of what Atheris mutates; 2 s, 300 MiB as everywhere.
    limits = ["-timeout=2", "-rss_limit_mb=1024", "-malloc_limit_mb=300", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
