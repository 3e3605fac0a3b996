"""Do it: qemu-img, locks, journal, recovery."""
