"""What is merged: random chains and trees of images, and how. The seed alone decides.

Like `fixtures.generate`, without hypothesis: a case is found again by its number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fixtures.language import SECTOR, LayerSpec, Run, format_layer, resolve_size

__all__ = ["NAMES", "STRATEGIES", "Case", "Image", "draw"]

STRATEGIES = ("auto", "pull", "commit", "both", "copy")
NAMES = ("kept", "lowest", "target")

_CLUSTERS = (65536, 65536, 4096, 512, 1024, 16384, 32768)
_SIZES = (256 << 10, 1 << 20, 1 << 20, 3 << 20)
_KINDS = "ABC-DE-0FGH+~.abcd"
_LATER_KINDS = "-ABC-DEFGH-0+~."  # over what is allocated qemu does not compress
_MODES = (0o600, 0o640, 0o644, 0o660)


@dataclass(frozen=True)
class Image:
    """One image: its file's name below the directory, that of its backing file, its layer.

    `whole`: the backing name is an absolute path.
    """

    name: str
    parent: str | None
    spec: LayerSpec
    whole: bool
    mode: int
    owner: int

    @property
    def format(self) -> str:
        return self.spec.format


@dataclass(frozen=True)
class Case:
    """Images, base first, the points to drop, and how to merge."""

    seed: int
    images: tuple[Image, ...]
    drop: tuple[str, ...]
    strategy: str
    names: str
    verify: str = "moved"
    extra: tuple[str, ...] = field(default=())

    @property
    def leaves(self) -> tuple[str, ...]:
        parents = {image.parent for image in self.images}
        return tuple(image.name for image in self.images if image.name not in parents)

    @property
    def kept(self) -> tuple[str, ...]:
        return tuple(image.name for image in self.images if image.name not in self.drop)

    @property
    def tree(self) -> dict[str, tuple[str | None, LayerSpec]]:
        """For `fixtures.shadow.shadow_tree`."""
        return {image.name: (image.parent, image.spec) for image in self.images}

    def kept_below(self, name: str) -> str | None:
        """The next kept image below a kept one: what it backs on in the end."""
        parents = {image.name: image.parent for image in self.images}
        below = parents[name]
        while below is not None and below in self.drop:
            below = parents[below]
        return below

    def dropped_below(self, name: str) -> list[str]:
        """The dropped images between a kept one and the next."""
        parents = {image.name: image.parent for image in self.images}
        out, below = [], parents[name]
        while below is not None and below in self.drop:
            out.append(below)
            below = parents[below]
        return out

    def argv(self, directory: Path) -> list[str]:
        """The command line (without the program's name) that merges it."""
        words = ["merge", *(str(directory / name) for name in self.leaves)]
        for name in self.drop:
            words += ["--drop", str(directory / name)]
        words += ["--strategy", self.strategy, "--names", self.names, "--verify", self.verify]
        return [*words, *self.extra, "--allow-format-change", "--allow", str(directory), "--yes"]

    def __str__(self) -> str:
        lines = [f"case {self.seed}: {self.strategy}, names {self.names}, verify {self.verify}"]
        for image in self.images:
            over = "" if image.parent is None else f" over {image.parent}"
            fate = "dropped" if image.name in self.drop else "kept"
            lines.append(f"  {image.name}{over} ({fate}): {format_layer(image.spec)}")
        return "\n".join(lines)


def draw(
    seed: int,
    strategies: tuple[str, ...] = STRATEGIES,
    names: tuple[str, ...] = NAMES,
    verify: tuple[str, ...] = ("moved", "moved", "full", "manifest"),
) -> Case:
    """A case; whether qchain agrees to merge it is another matter."""
    dice = Random(seed)
    tree = dice.random() < 0.4
    scattered = dice.random() < 0.2
    count = dice.randint(3, 6) if tree else dice.randint(2, 5)
    images: list[Image] = []
    sizes: dict[str, int] = {}
    for number in range(count):
        parent = None
        if number:
            parent = dice.choice(images[-3:]) if tree else images[-1]
        below = None if parent is None else sizes[parent.name]
        spec = _layer(dice, below)
        place = dice.choice(("", "", "near/", "far/")) if scattered else ""
        name = f"{place}i{number}.{spec.format}"
        image = Image(
            name,
            None if parent is None else parent.name,
            spec,
            dice.random() < (0.5 if scattered else 0.1),
            dice.choice(_MODES),
            dice.choice((0, 0, 1234)),
        )
        images.append(image)
        sizes[name] = resolve_size(spec, below)
    parents = {image.parent for image in images}
    inner = [image.name for image in images if image.name in parents]
    drop = [name for name in inner if dice.random() < 0.65] or [dice.choice(inner)]
    return Case(
        seed,
        tuple(images),
        tuple(drop),
        dice.choice(strategies),
        dice.choice(names),
        dice.choice(verify),
    )


def _layer(dice: Random, below: int | None) -> LayerSpec:
    """One layer over a backing file of `below` bytes, None: a base."""
    size = below
    if size is None or dice.random() < 0.2:
        most = dice.choice(_SIZES) // SECTOR
        size = dice.choice((most, dice.randint(1, most))) * SECTOR
    if below is None and dice.random() < 0.35:
        return LayerSpec(_passes(dice, size, 65536, False), format="raw", size=size)
    cluster = dice.choice(_CLUSTERS)
    version2 = dice.random() < 0.15
    extended = not version2 and cluster >= 16384 and dice.random() < 0.3
    metadata = (below is None or extended) and dice.random() < 0.1
    return LayerSpec(
        passes=_passes(dice, size, cluster, not metadata),
        cluster_size=cluster,
        version=2 if version2 else 3,
        extended_l2=extended,
        compression="zstd" if not version2 and dice.random() < 0.3 else "zlib",
        size=None if size == below else size,
        preallocation="metadata" if metadata else None,
    )


def _passes(dice: Random, size: int, cluster: int, compressed: bool) -> tuple[tuple[Run, ...], ...]:
    first = _runs(dice, size, cluster, _KINDS, compressed)
    if dice.random() < 0.3:
        return first, _runs(dice, size, cluster, _LATER_KINDS, False)
    return (first,)


def _runs(dice: Random, size: int, cluster: int, kinds: str, compressed: bool) -> tuple[Run, ...]:
    """Runs in sectors, in clusters, in eighths of the disk; compressed ones where aligned."""
    units = (min(cluster, size), SECTOR, max(SECTOR, size // 8 // SECTOR * SECTOR))
    runs: list[Run] = []
    offset = 0
    for _ in range(dice.randint(1, 10)):
        kind = dice.choice(kinds)
        length = min(dice.randint(1, 6) * dice.choice(units), size - offset)
        if kind.islower():
            if compressed and offset % cluster == 0:
                length = min(-(-length // cluster) * cluster, size - offset)
            else:
                kind = kind.upper()
        if length <= 0:
            break
        runs.append(Run(length, kind))
        offset += length
    return tuple(runs)
