"""`python -m fuzz [--count N] [--seed N] [--workers N]`: see docs/fuzzing.md.

Exit code 1 when anything was found.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

from fixtures.shapes import build_shapes
from fuzz.probe import probe
from fuzz.watch import Result, run
from fuzz.worker import Plan


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="images (default a million)")
    parser.add_argument("--seed", type=int, default=1, help="of the first image; then counted up")
    parser.add_argument("--workers", type=int, help="processes (default: one for each processor)")
    parser.add_argument("--keep", type=Path, default=Path("build/finds"), metavar="DIR",
                        help="where finds go")  # fmt: skip
    parser.add_argument("--atheris", type=int, default=60, metavar="SECONDS",
                        help="of the header's parser, where atheris is installed")  # fmt: skip
    chosen = parser.parse_args()

    plan = Plan(build_shapes(), probe, chosen.seed, chosen.count)
    print(f"{len(plan.shapes)} shapes, {plan.count} images from seed {plan.first}", flush=True)
    result = run(plan, chosen.workers, chosen.keep, lambda now: _progress(plan, now))
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(_summary(result))
    failed = bool(result.finds)
    if chosen.atheris and importlib.util.find_spec("atheris") is not None:
        print("\nthe parser under atheris", flush=True)
        argv = [sys.executable, "-m", "fuzz.parser", f"-max_total_time={chosen.atheris}"]
        failed |= subprocess.run(argv, check=False).returncode != 0
    return int(failed)


def _progress(plan: Plan, now: Result) -> None:
    rate = now.done / max(now.seconds, 1e-9)
    left = (plan.count - now.done) / max(rate, 1e-9)
    line = (
        f"{now.done:,} of {plan.count:,} images, {rate:.0f} a second, "
        f"{left / 60:.1f} minutes left, {sum(now.finds.values())} finds"
    )
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
    elif int(now.seconds) % 30 == 0:
        print(line, file=sys.stderr, flush=True)


def _summary(result: Result) -> str:
    rate = result.done / max(result.seconds, 1e-9)
    lines = [
        f"{result.done:,} images in {result.seconds:.0f} s ({rate:.0f} a second)",
        f"{result.opened:,} opened, {result.commands:,} went through the command too",
        f"memory: at most {result.peak / (1 << 20):.0f} MiB for one image",
        f"{sum(result.finds.values())} finds, {result.false_alarms} false alarms",
    ]
    lines += [f"  {count} x {cause}" for cause, count in result.finds.most_common()]
    lines += [f"  {path}" for path in result.kept]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
