"""One call of the library, timed without start-up: `python -m benchmarks.worker TASK IMAGE...`.

Prints {"seconds": float, "cpu": float}. The chain is opened before the clocks start.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qchain.chain.chain import Chain, open_chain
from qchain.chain.gate import Gate
from qchain.chain.layer import Qcow2Layer
from qchain.memory import aligned
from qchain.verify.compare import Comparison, compare

_PIECE = 1 << 20


def _statistics(chain: Chain) -> None:
    from qchain.chain.ownership import ownership

    ownership(chain.layers)


def _plan(chain: Chain) -> None:
    from qchain.plan.plan import make_plan
    from qchain.plan.selection import Request

    make_plan(chain, Request(flatten=True))


def _both(chain: Chain) -> None:
    _statistics(chain)
    _plan(chain)


def _read_tables(chain: Chain) -> None:
    """Read the bytes of all L2 tables and do nothing with them.

    The tables follow each other in the images of `fixtures.bigmeta`; one thread, one buffer.
    """
    view = memoryview(aligned(_PIECE).data)
    for layer in chain.layers:
        assert isinstance(layer, Qcow2Layer)
        tables = layer.tables.l1[layer.tables.l1 > 0]
        start, length = int(tables.min()), len(tables) * layer.cluster_size
        for offset in range(start, start + length, _PIECE):
            os.preadv(layer.file.fd, [view[: start + length - offset]], offset)


def _read(chain: Chain) -> None:
    """The guest-visible content from beginning to end."""
    from qchain.chain.reader import pieces

    for _ in pieces(chain.layers):
        pass


def _dissect(path: Path) -> None:
    """The same through dissect.hypervisor; a single image without a backing file."""
    from dissect.hypervisor.disk.qcow2 import QCow2  # type: ignore[import-not-found]

    with path.open("rb") as file:
        disk = QCow2(file)
        stream = disk.open() if hasattr(disk, "open") else disk
        while stream.read(4 << 20):
            pass


_TASKS: dict[str, Callable[[Chain], None]] = {
    "statistics": _statistics,
    "plan": _plan,
    "both": _both,
    "read-tables": _read_tables,
    "read": _read,
}


def _same(found: Comparison) -> None:
    assert found.identical


def _timed(call: Callable[[], None]) -> dict[str, float]:
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def main() -> None:
    task, path = sys.argv[1], Path(sys.argv[2])
    # What a task imports is start-up.
    import concurrent.futures.thread  # noqa: F401

    if task == "compare":
        with open_chain(path, Gate()) as a, open_chain(Path(sys.argv[3]), Gate()) as b:
            spent = _timed(lambda: _same(compare(a.layers, b.layers)))
    elif task == "dissect":
        spent = _timed(lambda: _dissect(path))
    else:
        from qchain.chain import ownership, reader  # noqa: F401
        from qchain.plan import plan  # noqa: F401

        with open_chain(path, Gate()) as chain:
            spent = _timed(lambda: _TASKS[task](chain))
    print(json.dumps(spent))


if __name__ == "__main__":
    main()
