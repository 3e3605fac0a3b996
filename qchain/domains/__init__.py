"""Domains of libvirt: their disks' chains and their snapshot records, changed together."""
