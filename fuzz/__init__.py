"""Hostile images by the million through the library, `make fuzz`.

`fixtures.hostile` makes the mutants, `probe` has the library read one in every way, `stage` puts it
on disk, `worker` does this over and over in a process that `watch` watches, `finds` makes a find
small and keeps it. See docs/fuzzing.md.
"""
