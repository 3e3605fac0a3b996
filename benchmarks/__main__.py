"""`python -m benchmarks [--quick] [--only GROUP] [--json FILE]`.

Measures qchain and its peers side by side, prints one table of ratios and writes JSON.
A goal that is missed is reported, never an error: times belong to the machine.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import ROOT
from benchmarks.report import Row, as_json, heading, line
from benchmarks.rows import GROUPS


def main() -> None:
    names = [group.name for group in GROUPS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small images, less than a minute")
    parser.add_argument("--only", action="append", choices=names, metavar="GROUP",
                        help=f"one of {', '.join(names)}; repeatable")  # fmt: skip
    parser.add_argument("--directory", type=Path, help="for the images, up to 13 GB")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), metavar="FILE")
    chosen = parser.parse_args()

    # As pip leaves an installed package: not to be compiled at every start.
    for package in ("qchain", "cli", "benchmarks"):
        compileall.compile_dir(ROOT / package, quiet=2)
    rows: list[Row] = []
    print(heading(), flush=True)
    for group in GROUPS:
        if chosen.only and group.name not in chosen.only:
            continue
        # Each group's images go before the next one's come.
        with tempfile.TemporaryDirectory(prefix="qchain-bench-", dir=chosen.directory) as place:
            try:
                for found in group.rows(Path(place), chosen.quick):
                    # In small images start-up counts more than the work.
                    row = replace(found, judged=not chosen.quick)
                    rows.append(row)
                    print(line(row), flush=True)
            except Exception as error:  # a row that fails must not cost the others
                note = " ".join(f"{type(error).__name__}: {error}".split())
                rows.append(Row(f"{group.name}: not measured", None, note=note))
                print(line(rows[-1]), flush=True)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(as_json(rows, chosen.quick), indent=2) + "\n")
    missed = sum(row.met is False for row in rows)
    load = os.getloadavg()[1] / len(os.sched_getaffinity(0))
    print(f"\n{missed} goals missed; written to {chosen.json}")
    print("ratio: by the clock; cpu: by processor seconds, which other work disturbs less")
    if load > 1.2:
        print(f"the machine was busy with other work (load {load:.1f} per processor)")


if __name__ == "__main__":
    main()
