# Everything from a fresh clone: each target first installs what is missing (scripts/setup).
.PHONY: help setup chain demo test damaged product domains bench fuzz torture clean

help:
	@echo "make demo    build a real chain, merge it, prove that nothing changed"
	@echo "make test    linters, types and all tests"
	@echo "make damaged check against qemu-img check on COUNT=10000 damaged images, seeds from SEED=0"
	@echo "make product read images of qemu-img in all 9641 combinations of its options"
	@echo "make domains walks through snapshots (WALKS=20), kills at every step, with a real libvirt"
	@echo "make bench   qchain and qemu-img side by side (BENCH=--quick: small images)"
	@echo "make fuzz    a million damaged images through the library (FUZZ=\"--count 10000 --seed 5\")"
	@echo "make torture merges killed, without power, on full disks, lied to, raced (as root;"
	@echo "             TORTURE=\"--kills 100 --power 20 --seed 5\"; docs/reliability.md)"
	@echo "make chain   the demo's chain in DIR, to try things on (make chain DIR=/tmp/vm)"
	@echo "make setup   only install what demo and bench need; the command is .venv/bin/qchain"
	@echo "make clean   remove .venv and all caches"

setup:
	@bash scripts/setup

chain: setup
	@.venv/bin/python -m fixtures.ext4 $(or $(DIR),$(error say DIR=/tmp/vm))

demo: setup
	@.venv/bin/python -m fixtures.demo

test:
	@bash scripts/test

COUNT ?= 10000
SEED ?= 0
damaged:
	@bash scripts/setup tests
	@QCHAIN_DAMAGED=$(COUNT) QCHAIN_SEED=$(SEED) .venv/bin/python -m pytest -n auto \
		tests/test_check.py -k damaged_images

product:
	@bash scripts/setup tests
	@QCHAIN_PRODUCT=all .venv/bin/python -m pytest -n auto tests/test_product.py

WALKS ?= 20
domains:
	@bash scripts/setup tests
	@QCHAIN_DOMAINS=all QCHAIN_WALKS=$(WALKS) .venv/bin/python -m pytest -n auto \
		tests/test_domain_*.py

bench: setup
	@.venv/bin/python -m benchmarks $(BENCH)

fuzz: setup
	@.venv/bin/python -m fuzz $(FUZZ)

torture:
	@bash scripts/setup tests
	@.venv/bin/python -m torture $(TORTURE)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
