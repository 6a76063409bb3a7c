# Each target sets up all it needs in a virtual environment, .venv.
PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --no-compile --disable-pip-version-check --prefer-binary --constraint constraints.txt
# what pip would do on one core; some package holds a file that is no Python
COMPILE = .venv/bin/python -m compileall -qq -j 0 .venv/lib || true

.PHONY: pretrain test quick lint docs
pretrain: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" deepspeed dnazen/pretrain.py --deepspeed ds_configs/zero2.json

# Corpora and checkpoints are synced as they are written, which takes a disk long: tests write to memory where it has room.
SHM = $(shell test "$$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt 8000000 2>/dev/null && echo TMPDIR=/dev/shm)

# a worker for each core, and one thread in each
PYTEST = PATH="$(CURDIR)/.venv/bin:$$PATH" OMP_NUM_THREADS=1 $(SHM) python -m pytest --numprocesses auto --dist worksteal

test: .venv/installed-test
	$(PYTEST)

# all that runs within this process in a moment
quick: .venv/installed-test
	$(PYTEST) -m "not slow"

# mypy finds packages by the names of their folders, and `kernels` is imported by another
lint: .venv/installed-test
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	mkdir -p build/lint && ln -sfn "$(CURDIR)/kernels" build/lint/dnazen_kernels
	MYPYPATH=build/lint .venv/bin/mypy

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# torch comes first: what follows then accepts the build that is there
.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation --editable .
	$(COMPILE)
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) --no-build-isolation --editable '.[test]'
	$(COMPILE)
	touch $@

.venv/installed-docs: .venv/installed
	$(PIP) --no-build-isolation --editable '.[docs]'
	$(COMPILE)
	touch $@
