# `make run` and `make test` do all their set-up: they need Python >= 3.11, make and a package index, nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.normwise-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

# Tests start some fifty processes; without bytecode each would compile the package again, and pytest every test in every run.
test test-long: export PYTHONDONTWRITEBYTECODE :=

.PHONY: run test check test-long clean
run: $(STAMP)
	$(BIN)/normwise compare cnn --json out/cnn/results.json --report out/cnn

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 25

check: $(STAMP)
	$(BIN)/ruff check src tests examples docs
	$(BIN)/mypy

test-long: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "long or not long"

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	rm -f $(VENV)/.normwise-* && touch $@

clean:
	rm -rf $(VENV) out build src/*.egg-info
