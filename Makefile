# `make demo` and `make test` set everything up on a fresh machine with Python >= 3.10.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# One pinned, tested set of versions (torch included: the index decides between its CPU and CUDA builds).
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help setup demo test soak lint format clean

help: ## what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## the virtual environment, with everything that the demo and the tests need

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("turbotrain needs Python >= 3.10, this is %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools wheel
	$(PIP) torch
	$(PIP) -e '.[dev]'
	touch $@

demo: setup ## SLA, rCM, W8A8 and a report from the shipped teacher, on this machine's CPU (outputs/shapes/)
	$(RUN) train.py recipe=shapes
	$(RUN) infer.py checkpoint=outputs/shapes/quantize/checkpoint prompt="a large red circle moves right slowly on a black background" output=outputs/shapes/demo.mp4
	@echo "video:  outputs/shapes/demo.mp4"
	@echo "report: outputs/shapes/report.html"

test: setup lint ## everything that CI checks
	$(RUN) -m pytest -q -n 2 --dist loadfile
	TRITON_INTERPRET=1 $(RUN) -m pytest -q -n 2 --dist loadfile tests/triton

soak: setup ## what is too long for CI: twenty kills, ten thousand steps of flat memory
	$(RUN) -m pytest -q -s tests/soak

lint: setup ## style, types, import contract
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

format: setup ## rewrite the code in the project's style
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean: ## remove the virtual environment and caches; outputs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
