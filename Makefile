# All set-up is automatic: a target makes what it needs, once. `make PYTHON=python3.12 ...` picks another Python.

VENV := .venv
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c '$(SUITABLE)' 2>/dev/null && echo $$python && break; done)

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: demo test check lint wheel clean system-packages gpu-check

demo: $(VENV)/installed
	$(VENV)/bin/streamd demo

test: system-packages check
	$(VENV)/bin/pytest

check: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Needs no network: where torch is there already, it runs with that Python.
gpu-check:
	$(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3) -m benchmarks.gpu_check

wheel: $(VENV)/installed-dev
	$(VENV)/bin/python -m build --wheel

clean:
	rm -rf $(VENV) build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

system-packages:
	@tests/install-debian-packages.sh

# Debian and Ubuntu keep what `python -m venv` needs in a package of its own.
$(VENV)/bin/python:
	@test -n '$(PYTHON)' || { echo 'streamd needs Python 3.11, 3.12 or 3.13, and none of them is here'; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || tests/install-debian-packages.sh \
		$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/pip install --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/pip install --editable '.[dev]'
	@touch $(VENV)/installed $@
