"""What is in this file? The qcow2 format: declared, parsed, decoded in bulk.

- `structures`: every structure of the format, declared with construct. This is
  the specification.
- `heads`: headers and heads of entries read with `struct`, proved equal to it.
- `header`: header, feature bits and extensions, judged by qemu's limits.
- `snapshots`, `bitmaps`, `refcounts`: the other tables of an image.
- `foreign`: which other image format a file is in.
- `entries`, `tables`: the guest-to-host map in bulk, with numpy.

Import the module that is needed; nothing is imported here, so that looking at
one header does not load everything.
"""

__all__ = [
    "bitmaps",
    "entries",
    "foreign",
    "header",
    "heads",
    "refcounts",
    "snapshots",
    "structures",
    "tables",
]
