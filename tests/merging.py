"""What the merge tests share: build, merge, and let the shadow model and qemu-img judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fixtures.build import build_chain
from fixtures.language import LayerSpec
from fixtures.oracle import qemu_check, qemu_info, raw_of
from fixtures.shadow import shadow_points
from qchain.chain.chain import open_chain
from qchain.chain.gate import Gate
from qchain.plan.options import MergeOptions
from qchain.plan.plan import Plan, make_plan
from qchain.plan.selection import Request
from qchain.plan.steps import Step
from qchain.run.execute import MergeResult, execute
from qchain.run.qemu_img import QemuImg

__all__ = ["Disk", "build"]


@dataclass
class Disk:
    """A chain on disk and what every one of its points must read, by file name."""

    directory: Path
    paths: list[Path]
    points: dict[str, bytes]

    @property
    def active(self) -> Path:
        return self.paths[-1]

    def plan(self, request: Request, options: MergeOptions | None = None) -> Plan:
        with open_chain(self.active) as chain:
            return make_plan(chain, request, options)

    def merge(
        self,
        drop: Iterable[str] = (),
        options: MergeOptions | None = None,
        *,
        request: Request | None = None,
        before_step: Callable[[Step], None] | None = None,
        qemu: QemuImg | None = None,
        gate: Gate | None = None,
    ) -> tuple[Plan, MergeResult]:
        """Merge; raises what qchain raises, `AssertionError` when the plan refuses."""
        with open_chain(self.active, gate) as chain:
            plan = make_plan(chain, request or Request(drop=tuple(drop)), options)
            assert not plan.refusals, plan.refusals
            return plan, execute(plan, chain, qemu, before_step=before_step)

    def expect(self, results: dict[str, str], *, complete: bool = True) -> None:
        """Every file `name` reads as the point `results[name]` did, says qemu-img.

        `complete`: and nothing else lies in the directory.
        """
        for name, point in results.items():
            path = self.directory / name
            fmt = format_of(path)
            assert raw_of(path, fmt) == self.points[point], f"{name} does not read as {point} did"
            if fmt == "qcow2":
                assert qemu_check(path) == {"corruptions": 0, "leaks": 0}, name
        if complete:
            assert sorted(p.name for p in self.directory.iterdir()) == sorted(results)

    def expect_point(self, path: Path) -> None:
        """The image reads as its point did, leaked clusters or not."""
        assert raw_of(path, format_of(path)) == self.points[path.name], path.name

    def backing_of(self, name: str) -> tuple[str | None, str | None]:
        """Backing name and format that the header of `name` records."""
        info = qemu_info(self.directory / name)
        return info.get("backing-filename"), info.get("backing-filename-format")

    def after(self, plan: Plan) -> dict[str, str]:
        """Which files must be there after `plan`, and the point that each must show."""
        members = {index for group in plan.groups for index in group.group.members}
        out = {
            layer.path.name: layer.path.name
            for index, layer in enumerate(plan.layers)
            if index not in members
        }
        for group in plan.groups:
            assert group.result is not None
            out[group.result.name] = plan.layers[group.group.kept].path.name
        return out


def format_of(path: Path) -> str:
    with path.open("rb") as file:
        return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"


def build(
    directory: Path, layers: Sequence[str | LayerSpec], names: Sequence[str] | None = None
) -> Disk:
    """Build a chain, base first."""
    chain = build_chain(directory, layers, names)
    points = shadow_points(layers)
    return Disk(
        directory,
        list(chain.paths),
        {path.name: point for path, point in zip(chain.paths, points, strict=True)},
    )
