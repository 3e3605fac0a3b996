"""The order of writes for a copy: a new file, private until it is whole, then one rename.

What the guest reads if everything stops after a step is said beside each step: j is the kept
image, N the new backing. What a stop leaves of the new file is thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qchain.chain.layer import Layer
from qchain.chain.scan import WORK_PREFIX
from qchain.plan.candidates import Candidate
from qchain.plan.copying import copy_argvs
from qchain.plan.names import absolute_name, backing_name, saved_name, valid_name
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Group
from qchain.plan.sequence import MANIFEST, Above, keep_manifest, lead
from qchain.plan.steps import (
    Adopt,
    Command,
    Compare,
    Confirm,
    HardLink,
    MakeDirectory,
    NativeCopy,
    RemoveDirectory,
    Rename,
    Step,
    Sync,
    TakeAttributes,
    TakeManifest,
    Unlink,
)

__all__ = ["copy_sequence"]


def copy_sequence(
    layers: Sequence[Layer],
    group: Group,
    candidate: Candidate,
    options: MergeOptions,
    token: str,
    above: Sequence[Above],
    elsewhere: Sequence[Path] = (),
) -> tuple[list[Step], Path]:
    """The steps that replace `group` by a new file, and the path of the result.

    Args: as `qchain.plan.sequence.sequence`.
    """
    kept = layers[group.kept]
    j_path = absolute_name(kept.path)
    final = j_path if options.names == "kept" else absolute_name(layers[group.owned[-1]].path)
    work = final.parent / f"{WORK_PREFIX}{token}"
    image = work / "image"
    below = None if group.below is None else layers[group.below]
    below_path = None if below is None else absolute_name(below.path)
    steps: list[Step] = [MakeDirectory(work)]
    manifest = work / MANIFEST if options.verify == "manifest" else None
    if manifest is not None:
        steps.append(TakeManifest(j_path, manifest, kept.size))
    lowest = layers[group.members[-1]]
    name = None
    if below is not None and below_path is not None:
        name = valid_name(backing_name(lowest, below, final.parent), below_path, elsewhere)
    steps += _filled(layers, group, candidate, image, name)
    below_format = None if below is None else below.format
    steps += [Sync(image), Sync(work), Adopt(image)]
    steps.append(Confirm(image, below_path, below_format, final))
    if options.verify != "none":
        weight = candidate.write_bytes if options.verify == "moved" else kept.size
        formats = (kept.format, kept.format)
        steps.append(Compare(j_path, image, below_path, *formats, weight, below_format, manifest))
    if options.keep_files:
        # Before any name changes: that it cannot be made must stop nothing halfway.
        steps.append(HardLink(final, saved_name(final)))
    # One rename is the switch: before it j is the old file, after it the new. Where another
    # name of the group stays, j still reads through it: its own data over its own content.
    steps += [TakeAttributes(final, image), Sync(image), Rename(image, final), Sync(final.parent)]
    if final != j_path:
        for each in above:
            steps += lead(each, final, kept.format)
    directories = {final.parent}
    for index in group.owned:
        path = absolute_name(layers[index].path)
        if path != final and not options.keep_files:
            steps.append(Unlink(path))
            directories.add(path.parent)
    steps += [Sync(directory) for directory in sorted(directories)]
    if manifest is not None:
        steps += keep_manifest(manifest, final, options)
    steps += [RemoveDirectory(work), Sync(final.parent)]
    return steps, final


def _filled(
    layers: Sequence[Layer], group: Group, candidate: Candidate, image: Path, name: str | None
) -> list[Step]:
    """What gives the new file its content, and its backing file the last name."""
    kept, traffic = layers[group.kept], candidate.traffic
    below = None if group.below is None else layers[group.below]
    if candidate.engine == "native":
        label = f"copy {kept.path.name}"
        fmt = None if below is None else below.format
        return [NativeCopy(image, name, fmt, candidate.write_bytes, label)]
    told = [
        (f"copy {kept.path.name}", traffic.copy_bytes),
        ("pull into the copy", traffic.pull_bytes),
        (f"re-point {image.name}", 0),
    ]
    argvs = copy_argvs(kept, layers[group.line[1]], below, image, name)
    return [
        Command(
            tuple(argv),
            weight=weight,
            label=label,
            writes=(image,),
            room=candidate.peak_extra_bytes,
        )
        for argv, (label, weight) in zip(argvs, told, strict=False)
    ]
