"""A qemu-img that says 0 and has written something else into a header: nothing is deleted."""

from __future__ import annotations

from pathlib import Path

import pytest
from merging import Disk, build

from fixtures.oracle import raw_of
from qchain.errors import FailedMidway
from qchain.plan.options import MergeOptions
from qchain.run.qemu_img import QemuImg
from qchain.run.recover import journals_at, recover

LINES = ["256k:A 64k:- 64k:B", "64k:- 128k:C", "64k:D 128k:- 64k:D", "64k:E"]
NAMES = ("base", "mid", "top", "above")

POINTING = """#!/bin/bash
[ "$1 $2" = "rebase -u" ] || exec qemu-img "$@"
argv=("$@")
last="${@: -1}"
file="${last##*file.filename=}"
file="${file%%,*}"
"""
LIES = {
    "another format": """
for n in "${!argv[@]}"; do [ "${argv[n]}" = -F ] && argv[n+1]=raw; done
qemu-img "${argv[@]}"
""",
    "a table lost": """
qemu-img "$@" || exit
offset=$(od -A n -t u8 --endian=big -j 40 -N 8 "$file" | tr -d ' ')
printf '\\0\\0\\0\\0\\0\\0\\0\\0' |
    dd of="$file" bs=1 seek="$offset" conv=notrunc status=none
""",
    "longer": """
qemu-img "$@" || exit
truncate -s +65536 "$file"
""",
}

# Whose header is led elsewhere: the target's, before the switch; or that of the image above.
CASES = [("pull", "kept"), ("pull", "lowest"), ("commit", "target")]


def liar(directory: Path, lie: str) -> QemuImg:
    program = directory / "qemu-img"
    program.write_text(POINTING + LIES[lie])
    program.chmod(0o755)
    return QemuImg(program)


@pytest.mark.parametrize(("strategy", "names"), CASES)
@pytest.mark.parametrize("lie", LIES)
def test_what_a_header_write_must_leave(
    tmp_path: Path, lie: str, strategy: str, names: str
) -> None:
    disk: Disk = build(tmp_path / "images", LINES, NAMES)
    options = MergeOptions(strategy=strategy, names=names)
    with pytest.raises(FailedMidway):
        disk.merge(["mid.qcow2"], options, qemu=liar(tmp_path, lie))
    left = {path.name for path in disk.directory.iterdir()}
    assert left >= {*disk.points}
    if lie == "another format":
        # The word of the real one puts all right.
        recover(journals_at(disk.directory))
        if set(disk.points) == {path.name for path in disk.directory.iterdir()}:
            disk.merge(["mid.qcow2"], options)
        assert raw_of(disk.active) == disk.points["above.qcow2"]
        assert len(list(disk.directory.iterdir())) == 3
