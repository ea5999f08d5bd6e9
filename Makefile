# The first two targets are the README's commands. Both make their own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROCESSES := $(shell nproc 2>/dev/null || echo 2)

.PHONY: quick test lint digits clean

quick: $(VENV)/.installed
	$(BIN)/shiftproof run quick --jobs $(PROCESSES) --out runs/quick

test: $(VENV)/.installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(PROCESSES) --dist loadgroup

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

digits: $(VENV)/.installed
	$(BIN)/shiftproof run digits --jobs $(PROCESSES) --out runs/digits

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else \
		"expected Python 3.11 or newer, got " + v + "; name another: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
