# Each target sets up all it needs in a virtual environment, .venv.
PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check --prefer-binary --constraint constraints.txt

.PHONY: pretrain test
pretrain: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" deepspeed dnazen/pretrain.py --deepspeed ds_configs/zero2.json

test: .venv/installed-test
	PATH="$(CURDIR)/.venv/bin:$$PATH" python -m pytest

# torch comes first: what follows then accepts the build that is there
.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) --no-build-isolation --editable '.[test]'
	touch $@
