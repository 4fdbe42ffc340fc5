# make quickstart   run the whole pipeline, from text to an assistant, on this machine
# make test         run all checks
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTEST = .venv/bin/python -m pytest
PIP = .venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: install quickstart test unit lint clean

install: .venv/installed

quickstart: install
	.venv/bin/gptline run configs/quickstart.toml

test: lint unit
	$(PYTEST) -m "slow or gpu" --numprocesses=2 --durations=25

unit: .venv/installed-dev
	$(PYTEST) -m "not slow and not gpu" --numprocesses=2

lint: .venv/installed-dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv: some minutes; 2.3 GB, or 5.9 GB where pip takes the CUDA build of torch"
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .gptline
