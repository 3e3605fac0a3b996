"""qchain: an offline toolkit for qcow2 backing chains.

The public names of the library; importing the package itself imports nothing else:

    from qchain import Gate, open_chain, ownership
    with open_chain("disk.qcow2", Gate(allow=("/templates",))) as chain:
        print(ownership(chain.layers))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qchain.chain.chain import Chain, open_chain
    from qchain.chain.digest import digest
    from qchain.chain.extent import Extent
    from qchain.chain.gate import Gate
    from qchain.chain.ownership import Ownership, ownership
    from qchain.chain.reader import read
    from qchain.errors import ExitCode, QchainError
    from qchain.plan.options import MergeOptions
    from qchain.plan.plan import Plan, make_plan
    from qchain.plan.selection import Request
    from qchain.run.execute import MergeResult, execute
    from qchain.verify.compare import Comparison, compare

__all__ = [
    "Chain",
    "Comparison",
    "ExitCode",
    "Extent",
    "Gate",
    "MergeOptions",
    "MergeResult",
    "Ownership",
    "Plan",
    "QchainError",
    "Request",
    "compare",
    "digest",
    "execute",
    "make_plan",
    "open_chain",
    "ownership",
    "read",
]

_HOME = {
    "Chain": "chain.chain",
    "Comparison": "verify.compare",
    "ExitCode": "errors",
    "Extent": "chain.extent",
    "Gate": "chain.gate",
    "MergeOptions": "plan.options",
    "MergeResult": "run.execute",
    "Ownership": "chain.ownership",
    "Plan": "plan.plan",
    "QchainError": "errors",
    "Request": "plan.selection",
    "compare": "verify.compare",
    "digest": "chain.digest",
    "execute": "run.execute",
    "make_plan": "plan.plan",
    "open_chain": "chain.chain",
    "ownership": "chain.ownership",
    "read": "chain.reader",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: numpy and construct are not for `--help`."""
    if name not in _HOME:
        raise AttributeError(f"module 'qchain' has no attribute {name!r}")
    return getattr(import_module(f"qchain.{_HOME[name]}"), name)
