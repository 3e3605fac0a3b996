"""The part of `qchain recover` that is about domains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qchain.run.execute import Observer

__all__ = ["domains_at"]


def domains_at(where: Path, back: bool, observer: Observer) -> list[dict[str, str]]:
    """Finish the changes to domains whose journals concern `where`, or put them back.

    Raises: what `qchain.domains.work.recover_job` raises.
    """
    from qchain.chain.scan import DOMAIN_SUFFIX, WORK_PREFIX, unfinished_domains
    from qchain.run.durable import discard_unwritten

    directory = where if where.is_dir() else where.absolute().parent
    for path in directory.glob(f"{WORK_PREFIX}*{DOMAIN_SUFFIX}.new"):
        # Killed while it was written for the first time: nothing had begun.
        discard_unwritten(path)
    if not unfinished_domains([directory]):
        return []
    from qchain.domains.journal import domain_journals_at
    from qchain.domains.work import Tools, recover_job

    out = []
    for path in domain_journals_at(where):
        job = recover_job(path, Tools(observer=observer), back=back)
        outcome = "put back" if back else "finished"
        out.append({"domain": job.name, "words": job.words, "outcome": outcome})
    return out
