"""The kinds of findings: how bad each is, and one sentence on what it means for the guest."""

from __future__ import annotations

from enum import Enum

__all__ = ["MEANINGS", "Severity"]


class Severity(Enum):
    """How bad a finding is, in qemu-img's terms."""

    CORRUPTION = "corruption"
    LEAK = "leak"
    SUSPICION = "suspicion"
    """Against the specification, or about to harm, but qemu-img check says nothing."""


_C, _L, _S = Severity.CORRUPTION, Severity.LEAK, Severity.SUSPICION

MEANINGS: dict[str, tuple[Severity, str]] = {
    "leak": (
        _L,
        (
            "Host clusters are counted as used more often than anything refers to them "
            "({detail}): only space is lost, but they may still hold old data."
        ),
    ),
    "refcount-too-low": (
        _C,
        (
            "Host clusters are used more often than counted ({detail}): a write to the image may "
            "take them for free or change them in place, and the guest loses what it has there."
        ),
    ),
    "refcount-overflow": (
        _C,
        (
            "Host clusters have more references than a refcount of this image can hold: freeing "
            "one reference frees the cluster for all."
        ),
    ),
    "refcount-block-shared": (
        _C,
        (
            "A refcount block is used for something else too ({detail}): the next change of "
            "refcounts overwrites that."
        ),
    ),
    "refcount-table-reserved": (
        _C,
        (
            "A refcount table entry has reserved bits set: it was damaged, or this is no refcount"
            " table; writes may destroy guest data."
        ),
    ),
    "refcount-block-unaligned": (
        _C,
        (
            "A refcount table entry points into the middle of a cluster: the refcounts it leads "
            "to cannot be read, and the image cannot be written safely."
        ),
    ),
    "refcount-block-outside": (
        _C,
        (
            "A refcount block lies beyond the end of the file: its clusters seem free, so a write"
            " may overwrite guest data."
        ),
    ),
    "outside": (
        _C,
        "The {detail} lies beyond the end of the file: what it held is missing.",
    ),
    "l1-reserved": (
        _C,
        (
            "An L1 entry has reserved bits set: it was damaged, the part of the disk behind it "
            "may be wrong."
        ),
    ),
    "l1-unaligned": (
        _C,
        (
            "An L1 entry points into the middle of a cluster: the part of the disk behind it "
            "cannot be read."
        ),
    ),
    "l1-outside": (
        _C,
        ("An L2 table lies beyond the end of the file: the part of the disk behind it is missing."),
    ),
    "l1-no-table": (
        _C,
        "An L1 entry has flags but no L2 table: the part of the disk behind it is missing.",
    ),
    "l2-implausible": (
        _C,
        (
            "The L2 table holds something else ({detail}): it was overwritten, the part of the "
            "disk behind it cannot be read."
        ),
    ),
    "l2-reserved": (
        _C,
        (
            "An L2 entry has reserved bits set: it was damaged, this cluster of the guest may be "
            "wrong."
        ),
    ),
    "l2-unaligned": (
        _C,
        (
            "An L2 entry points into the middle of a host cluster: this cluster of the guest "
            "cannot be read."
        ),
    ),
    "l2-outside": (
        _C,
        (
            "An L2 entry points beyond the end of the file: the data of this cluster of the guest"
            " is missing."
        ),
    ),
    "l2-cut": (
        _S,
        (
            "The file ends within the data of this cluster of the guest: the rest of it reads as "
            "zeroes."
        ),
    ),
    "compressed-copied": (
        _C,
        "A compressed cluster has the COPIED flag: a write in place would destroy it.",
    ),
    "compressed-bitmap": (
        _C,
        (
            "A compressed cluster has a subcluster bitmap: one of the two is wrong, so this "
            "cluster of the guest may be."
        ),
    ),
    "compressed-data-file": (
        _C,
        "A compressed cluster in an image with an external data file: it cannot be read.",
    ),
    "subcluster-conflict": (
        _C,
        "Subclusters are both data and zero: this cluster of the guest cannot be read.",
    ),
    "subcluster-without-cluster": (
        _C,
        (
            "Subclusters are marked as data, but there is no host cluster: this cluster of the "
            "guest cannot be read."
        ),
    ),
    "copied-wrong": (
        _C,
        (
            "The COPIED flag is set though the refcount is not one: a write changes a host "
            "cluster in place that others use too, or that may be given away."
        ),
    ),
    "copied-missing": (
        _C,
        (
            "The COPIED flag is missing though the refcount is one: the next write copies the "
            "cluster without need, the guest's data is fine."
        ),
    ),
    "snapshot-table": (
        _C,
        (
            "The snapshot table cannot be read ({detail}): internal snapshots are lost, and what "
            "they use may be taken for free."
        ),
    ),
    "snapshot-incomplete": (
        _C,
        (
            "A snapshot table entry lacks the fields that version 3 demands: the size of the disk"
            " and of the VM state at that point are not certain."
        ),
    ),
    "snapshot-l1": (
        _C,
        (
            "An internal snapshot has an impossible L1 table ({detail}): this snapshot cannot be "
            "read."
        ),
    ),
    "snapshot-data-file": (
        _C,
        (
            "An internal snapshot in an image with an external data file: the data it should keep"
            " has been overwritten."
        ),
    ),
    "bitmap-directory": (
        _C,
        (
            "The bitmaps cannot be read ({detail}): the guest's data is fine, but the next backup"
            " has to be a full one."
        ),
    ),
    "bitmap-table-entry": (
        _C,
        (
            "A bitmap table entry is invalid: the guest's data is fine, but the next backup has "
            "to be a full one."
        ),
    ),
    "overlap": (
        _S,
        "A host cluster is used as {detail} at once: a write to one destroys the other.",
    ),
    "zero-flag-v2": (
        _S,
        (
            "An L2 entry has the zero flag, which version 2 does not know: this cluster of the "
            "guest cannot be read."
        ),
    ),
    "zero-flag-extended": (
        _S,
        "An extended L2 entry has bit 0 set, which is reserved: it may have been damaged.",
    ),
    "header": (
        _S,
        "The header says or shows that something is wrong: {detail}.",
    ),
}
"""Kind: how bad it is, and one sentence for people; `{detail}` is filled in."""
