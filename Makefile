# Everything from a fresh clone: each target first installs what is missing (scripts/setup).
.PHONY: help setup demo test bench fuzz clean

help:
	@echo "make demo    build a real chain, merge it, prove that nothing changed"
	@echo "make test    linters, types and all tests"
	@echo "make bench   qchain and qemu-img side by side (BENCH=--quick: small images)"
	@echo "make fuzz    a million damaged images through the library (FUZZ=\"--count 10000 --seed 5\")"
	@echo "make setup   only install what demo and bench need; the command is .venv/bin/qchain"
	@echo "make clean   remove .venv and all caches"

setup:
	@bash scripts/setup

demo: setup
	@.venv/bin/python -m fixtures.demo

test:
	@bash scripts/test

bench: setup
	@.venv/bin/python -m benchmarks $(BENCH)

fuzz: setup
	@.venv/bin/python -m fuzz $(FUZZ)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
