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
from qchain.plan.commands import (
    convert_argv,
    creation_options,
    rebase_plain_argv,
    rebase_unsafe_argv,
)
from qchain.plan.names import absolute_name, relative_name, saved_name
from qchain.plan.options import MergeOptions
from qchain.plan.selection import Group
from qchain.plan.sequence import Above, lead
from qchain.plan.steps import (
    Adopt,
    Command,
    Compare,
    Confirm,
    HardLink,
    MakeDirectory,
    RemoveDirectory,
    Rename,
    Step,
    Sync,
    TakeAttributes,
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
    steps += _filled(layers, group, candidate, image)
    name = _final_name(layers, group, final)
    if below is not None and name != str(below_path):
        # As it is to be named from where the file will lie; nobody reads the file here.
        argv = rebase_unsafe_argv(image, kept.format, name, below.format)
        steps.append(Command(tuple(argv), label=f"re-point {image.name}", writes=(image,)))
    below_format = None if below is None else below.format
    steps += [Sync(image), Sync(work), Adopt(image)]
    steps.append(Confirm(image, below_path, below_format, final))
    if options.verify != "none":
        weight = kept.size if options.verify == "full" else candidate.write_bytes
        formats = (kept.format, kept.format)
        steps.append(Compare(j_path, image, below_path, *formats, weight, below_format))
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
    steps += [RemoveDirectory(work), Sync(final.parent)]
    return steps, final


def _filled(layers: Sequence[Layer], group: Group, candidate: Candidate, image: Path) -> list[Step]:
    """The commands that give the new file its content."""
    kept = layers[group.kept]
    source, how = absolute_name(kept.path), creation_options(kept.header)
    label = f"copy {kept.path.name}"
    copied = candidate.traffic.copy_bytes
    if group.below is None:
        argv = convert_argv(source, kept.format, image, how)
        return [Command(tuple(argv), weight=copied, label=label, writes=(image,))]
    next_below, below = layers[group.line[1]], layers[group.below]
    # convert copies what the kept image itself allocates, whatever -B says (measured).
    argv = convert_argv(
        source, kept.format, image, how, absolute_name(next_below.path), next_below.format
    )
    steps: list[Step] = [Command(tuple(argv), weight=copied, label=label, writes=(image,))]
    pull = rebase_plain_argv(image, kept.format, absolute_name(below.path), below.format)
    weight = candidate.traffic.pull_bytes
    steps.append(Command(tuple(pull), weight=weight, label="pull into the copy", writes=(image,)))
    return steps


def _final_name(layers: Sequence[Layer], group: Group, final: Path) -> str | None:
    """How the result names its new backing: as the lowest image of the group did."""
    lowest = layers[group.members[-1]]
    if group.below is None or lowest.backing is None:
        return None
    below = absolute_name(layers[group.below].path)
    recorded = lowest.backing.name
    if recorded.startswith("/"):
        return str(below)
    if absolute_name(lowest.path).parent == final.parent:
        return recorded
    return relative_name(below, final.parent)
