"""Merges that are killed, lose power, fill the disk, are lied to and raced: `make torture`.

qchain is only what is tortured: as the command line, in a child process. What the images must read
like says the shadow model, what they do read like qemu-img. See docs/reliability.md.
"""
