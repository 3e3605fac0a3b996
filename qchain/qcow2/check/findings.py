"""What a check found: collected, counted, reported."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from qchain.qcow2.check.kinds import MEANINGS, Severity

__all__ = ["MAX_RANGES", "CheckReport", "Collector", "Finding"]

MAX_RANGES = 1 << 20
"""Leaked ranges that are listed; more are only counted."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: a key of `MEANINGS`.
        offset: in the host file, bytes: of the wrong entry, or of the cluster concerned.
        length: bytes from there that are concerned.
        meaning: one sentence, what it means for the guest.
        guest: offset on the disk of what the entry maps, where one is known.
    """

    kind: str
    severity: Severity
    offset: int
    length: int
    meaning: str
    guest: int | None = None


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found.

    Attributes:
        corruptions: how many, 0 exactly when `qemu-img check` finds none.
        leaks: clusters with a refcount above their references, as `qemu-img check`.
        suspicions: what qemu-img check does not look for.
        problems: findings in file order, of each kind at most the limit of the check.
        counts: how many there are of each kind, the unlisted ones included.
        leaked: (start, length) in bytes of clusters that are counted as used though nothing
            refers to them, in file order; at most 2^20 ranges.
        clusters: host clusters that were checked.
    """

    corruptions: int
    leaks: int
    suspicions: int
    problems: list[Finding]
    counts: dict[str, int]
    leaked: list[tuple[int, int]] = field(default_factory=list)
    clusters: int = 0

    @property
    def clean(self) -> bool:
        """Nothing at all was found."""
        return not (self.corruptions or self.leaks or self.suspicions)


class Collector:
    """Counts findings, and keeps the first `limit` of each kind."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.counts: Counter[str] = Counter()
        self.kept: list[Finding] = []
        self._kept_of: Counter[str] = Counter()
        self.leaked: list[tuple[int, int]] = []

    def room(self, kind: str) -> int:
        """How many more findings of this kind will be kept."""
        return max(0, self.limit - self._kept_of[kind])

    def add(
        self,
        kind: str,
        offset: int,
        length: int,
        detail: str = "",
        *,
        guest: int | None = None,
        count: int = 1,
    ) -> None:
        """Note a finding that counts as `count`."""
        self.counts[kind] += count
        if not self.room(kind):
            return
        self._kept_of[kind] += 1
        severity, text = MEANINGS[kind]
        meaning = text.format(detail=detail)
        self.kept.append(Finding(kind, severity, offset, length, meaning, guest))

    def count_only(self, kind: str, count: int) -> None:
        """Count findings for which there is no room."""
        if count:
            self.counts[kind] += count

    def add_leaked(self, start: int, length: int) -> None:
        """Note clusters that nothing refers to; neighbours are joined."""
        if self.leaked and sum(self.leaked[-1]) == start:
            self.leaked[-1] = self.leaked[-1][0], self.leaked[-1][1] + length
        elif len(self.leaked) < MAX_RANGES:
            self.leaked.append((start, length))

    def report(self, clusters: int) -> CheckReport:
        """All that was collected."""
        total = dict.fromkeys(Severity, 0)
        for kind, count in self.counts.items():
            total[MEANINGS[kind][0]] += count
        return CheckReport(
            corruptions=total[Severity.CORRUPTION],
            leaks=total[Severity.LEAK],
            suspicions=total[Severity.SUSPICION],
            problems=sorted(self.kept, key=lambda each: (each.offset, each.kind)),
            counts=dict(self.counts),
            leaked=self.leaked,
            clusters=clusters,
        )
