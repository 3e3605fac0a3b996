"""Is one image consistent? Refcounts rebuilt from every reference, against those stored.

- `kinds`: what can be found, and what each means for the guest; `findings`: what was.
- `overlay`: ranges that overlap, as disjoint ones with weights: whatever an image
  announces, every byte of it is looked at once.
- `references`: everything that refers to host clusters, except L2 entries.
- `l2`: the L2 entries, in bulk.
- `stored`: the refcounts that the image holds; `tally`: those counted.
- `check`: `check_image`, which brings them together.

Agrees with `qemu-img check` on whether there are corruptions and on the number of
leaked clusters. What qemu-img passes over is counted apart, as suspicions.
"""

from qchain.qcow2.check.check import check_image
from qchain.qcow2.check.findings import CheckReport, Finding
from qchain.qcow2.check.kinds import Severity

__all__ = ["CheckReport", "Finding", "Severity", "check_image"]
