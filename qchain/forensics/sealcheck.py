"""A chain held against its seal: which images are as they were, changed, new, or gone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qchain.chain.chain import Chain
from qchain.forensics.seal import make_seal

__all__ = ["LayerCheck", "SealCheck", "check_seal", "pair_layers"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """One image. `state`: 'unchanged', 'changed', 'new' (not sealed), or 'vanished' (sealed,
    but the chain leads to it no more; it has no `path`). `sealed_as`: its name then."""

    name: str
    state: str
    path: str | None = None
    sealed_as: str | None = None


@dataclass(slots=True)
class SealCheck:
    """What a chain is like, held against its seal.

    `layers`: as they are now, active first, then what vanished. `changes`: sentences, each
    about a change of content or of the chain. `notes`: other names or times of the same
    content. `point_same`: the guest still sees what it saw (False also when that cannot be read).
    """

    sealed: str
    point_same: bool
    layers: list[LayerCheck] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        return not self.changes


def check_seal(chain: Chain, seal: dict[str, Any], progress: Progress | None = None) -> SealCheck:
    """Read everything again and hold it against `seal` (of `read_seal`).

    Raises: `ImageError` when anything cannot be read.
    """
    now = make_seal(chain, progress)
    same = now["point"] == seal["point"] and now["point"]["sha256"] is not None
    out = SealCheck(seal["sealed"], same)
    pairs = pair_layers(now["layers"], seal["layers"])
    for index, found in enumerate(now["layers"]):
        before = pairs.get(index)
        if before is None:
            out.layers.append(LayerCheck(found["name"], "new", found["path"]))
            out.changes.append(f"{found['name']}: was not sealed, it is new in the chain")
            continue
        sealed = seal["layers"][before]
        changes = _changes(found, sealed, out)
        state = "changed" if changes else "unchanged"
        out.layers.append(LayerCheck(found["name"], state, found["path"], sealed["name"]))
        out.changes += changes
    for index in sorted(set(range(len(seal["layers"]))) - set(pairs.values())):
        name = seal["layers"][index]["name"]
        out.layers.append(LayerCheck(name, "vanished", sealed_as=name))
        out.changes.append(f"{name}: was sealed, the chain leads to it no more{_rest(chain, name)}")
    order = list(pairs.values())
    if order != sorted(order):
        out.changes.append("the images that were sealed stand in another order")
    if now["missing"] != seal.get("missing") and (now["missing"] or seal.get("missing")):
        _compare_missing(now["missing"], seal.get("missing"), out)
    if now["point"]["sha256"] is None:
        out.notes.append(f"what the guest sees cannot be read: {now['unreadable']}")
    elif seal["point"]["sha256"] is None:
        out.notes.append("what the guest sees could not be read when the chain was sealed")
    elif not same:
        out.changes.append("the guest sees another content than was sealed")
    return out


def pair_layers(
    found: Sequence[dict[str, Any]], sealed: Sequence[dict[str, Any]]
) -> dict[int, int]:
    """Which sealed layer each layer found is: indexes of `found` to those of `sealed`.

    Images come and go between the two, so a place in the chain says nothing. What has the
    same content is the same, best under its old path or name; what is left is the same if
    it has the path, else the name.
    """
    keys: tuple[tuple[str, ...], ...] = (
        *(("sha256", "path"), ("sha256", "name"), ("sha256",)),
        *(("path",), ("name",)),
    )
    pairs: dict[int, int] = {}
    left = dict.fromkeys(range(len(sealed)))
    for key in keys:
        waiting: dict[tuple[object, ...], list[int]] = {}
        for index in reversed(left):
            waiting.setdefault(tuple(sealed[index].get(each) for each in key), []).append(index)
        for index, facts in enumerate(found):
            same = waiting.get(tuple(facts[each] for each in key))
            if index not in pairs and same:
                pairs[index] = same.pop()
                del left[pairs[index]]
    return dict(sorted(pairs.items()))


def _rest(chain: Chain, name: str) -> str:
    """Whether a file of a vanished image is still beside the active one."""
    beside = chain.active.path.parent / Path(name).name
    if not os.path.lexists(beside):
        return ""
    return " (a file of that name is still there)"


def _compare_missing(now: str | None, before: object, out: SealCheck) -> None:
    if before is None:
        out.changes.append(f"{now}: missing, taken for zeroes; when sealed, nothing was")
    elif now is None:
        out.notes.append(f"{before}: was missing when the chain was sealed")
    elif Path(now).name != Path(str(before)).name:
        out.changes.append(f"{now}: missing now; when sealed, it was {before}")


def _changes(found: dict[str, Any], sealed: dict[str, Any], out: SealCheck) -> list[str]:
    """What changed in one layer, as sentences; lesser things go to the notes of `out`."""
    changes = []
    if found["format"] != sealed.get("format"):
        changes.append(f"{found['name']}: is {found['format']}, not {sealed.get('format')}")
    changes += _compare(found, sealed, out)
    if ("data_file" in found) != ("data_file" in sealed):
        changes.append(f"{found['name']}: has another data file")
    elif "data_file" in found:
        changes += _compare(found["data_file"], sealed["data_file"], out)
    return changes


def _compare(found: dict[str, Any], sealed: dict[str, Any], out: SealCheck) -> list[str]:
    name = found["name"]
    if name != sealed["name"]:
        out.notes.append(f"{name}: was sealed under the name {sealed['name']}")
    if found["sha256"] == sealed["sha256"]:
        if found["mtime_ns"] != sealed["mtime_ns"]:
            out.notes.append(f"{name}: another time of change, the same content")
        return []
    parts = []
    if found["size"] != sealed["size"]:
        parts.append(f"its size is {found['size']}, not {sealed['size']} bytes")
    if found["header_sha256"] != sealed["header_sha256"]:
        parts.append("its first 64 KiB differ")
    if found["mtime_ns"] == sealed["mtime_ns"]:
        parts.append("though its time of change is the same")
    detail = f" ({', '.join(parts)})" if parts else ""
    return [f"{name}: the file was changed{detail}"]
