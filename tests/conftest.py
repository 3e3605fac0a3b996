"""The same environment for every run; and in continuous integration a skip is a failure.

`QCHAIN_NO_SKIP=1` (set by `.ci/run`) or `CI` in the environment turn this on. A test that skips
because a program is missing proves nothing, and nobody reads the list of skipped tests.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from libvirtd import Daemon

STRICT = bool(os.environ.get("QCHAIN_NO_SKIP") or os.environ.get("CI"))

# What a machine happens to set must neither hide a failure nor make one.
for _name in (
    "PYTHONUNBUFFERED",
    "NO_COLOR",
    "FORCE_COLOR",
    "COLUMNS",
    "LINES",
    "QCHAIN_ALLOW",
    "QCHAIN_DEBUG",
):
    os.environ.pop(_name, None)
os.environ["TERM"] = "xterm-256color"

# Whatever runs in the background of a script ignores ^C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # and of nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is such a place: what is tested is no disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    # An expected failure is reported as skipped too; it did run.
    if not (STRICT and report.skipped) or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid} would be skipped, and here nothing may be: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A whole module that skips itself (importorskip and the like)."""
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.fixture(scope="session")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A libvirt for the tests of this worker alone."""
    from libvirtd import daemon_in

    yield from daemon_in(tmp_path_factory.mktemp("libvirt"))
