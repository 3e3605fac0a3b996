"""The journal of a merge: what it does, and how far it is, beside the active image.

One JSON document, replaced as a whole and durably before each step. Format 1:

    {"qchain_journal": 1, "token", "active", "verify", "group": g, "step": s,
     "groups": [{"layers": [{"path", "format", "device", "inode"}], "target": t,
                 "below": b, "present": {"name", "format"} | null, "steps": [..]}]}

`layers` of a group: the kept image first, then all below it, down to the base. Step s
of group g may have been done in part, those before it are done. Without a journal
nothing is unfinished.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from qchain.chain.scan import JOURNAL_SUFFIX, WORK_PREFIX
from qchain.chain.scan import unfinished as find_journals
from qchain.errors import ImageError
from qchain.plan.plan import Plan
from qchain.plan.steps import Step
from qchain.plan.stored import step_from_json, step_to_json
from qchain.run.durable import unlink_durably, write_durably

__all__ = ["GroupRecord", "Journal", "LayerRecord", "find_journals", "read_journal"]


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A file of the chain as it was when the merge began."""

    path: Path
    format: str
    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """One group: indices count in `layers`; `present`: the target's backing name before."""

    layers: tuple[LayerRecord, ...]
    target: int
    below: int | None
    present: tuple[str, str | None] | None
    steps: tuple[Step, ...]


@dataclass
class Journal:
    """A merge under way. `write` before a step, `remove` when all is done."""

    path: Path
    active: Path
    verify: str
    groups: tuple[GroupRecord, ...]
    group: int = 0
    step: int = 0
    token: str = ""
    _head: dict[str, object] = field(default_factory=dict, repr=False)

    @classmethod
    def begin(cls, plan: Plan) -> Journal:
        """The journal of a plan, not written yet."""
        active = plan.layers[0].path.absolute()
        groups = []
        for group in plan.groups:
            assert group.chosen is not None and group.chosen.target is not None
            kept, target = group.group.kept, group.chosen.target
            backing = plan.layers[target].backing
            groups.append(
                GroupRecord(
                    tuple(
                        LayerRecord(
                            layer.path.absolute(),
                            layer.format,
                            layer.file.id.device,
                            layer.file.id.inode,
                        )
                        for layer in plan.layers[kept:]
                    ),
                    target - kept,
                    None if group.group.below is None else group.group.below - kept,
                    None if backing is None else (backing.name, backing.format),
                    group.steps,
                )
            )
        path = active.parent / f"{WORK_PREFIX}{plan.token}{JOURNAL_SUFFIX}"
        return cls(path, active, plan.options.verify, tuple(groups), token=plan.token)

    def write(self, group: int, step: int) -> None:
        """Durably: step `step` of group `group` is about to be done."""
        self.group, self.step = group, step
        if not self._head:
            self._head = {
                "qchain_journal": 1,
                "token": self.token,
                "active": str(self.active),
                "verify": self.verify,
                "groups": [_group_json(record) for record in self.groups],
            }
        document = {**self._head, "group": group, "step": step}
        text = json.dumps(document, indent=1, ensure_ascii=True)
        write_durably(self.path, text.encode("ascii"))

    def remove(self) -> None:
        """Nothing is left to do."""
        unlink_durably(self.path)


def _group_json(record: GroupRecord) -> dict[str, object]:
    return {
        "layers": [
            {"path": str(r.path), "format": r.format, "device": r.device, "inode": r.inode}
            for r in record.layers
        ],
        "target": record.target,
        "below": record.below,
        "present": record.present,
        "steps": [step_to_json(step) for step in record.steps],
    }


def read_journal(path: Path) -> Journal:
    """Raises `ImageError` when it is none, or of a later format."""
    try:
        stored = json.loads(path.read_bytes())
        if stored["qchain_journal"] != 1:
            raise ImageError(path, "was written by a later version", "use that one")
        groups = tuple(
            GroupRecord(
                tuple(
                    LayerRecord(Path(r["path"]), r["format"], r["device"], r["inode"])
                    for r in group["layers"]
                ),
                int(group["target"]),
                group["below"],
                None if group["present"] is None else tuple(group["present"]),
                tuple(step_from_json(step) for step in group["steps"]),
            )
            for group in stored["groups"]
        )
        return Journal(
            path,
            Path(stored["active"]),
            str(stored["verify"]),
            groups,
            int(stored["group"]),
            int(stored["step"]),
            str(stored["token"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImageError(path, f"is not a journal of qchain: {error}", "look at it") from None
