# `make run` and `make test` do all their set-up: they need Python >= 3.11, make and a package index, nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
KEY    := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# A set-up for each purpose: what is tried in the first minutes needs a tenth of what the tests need.
RUN    := $(VENV)/.run-$(KEY)
TEST   := $(VENV)/.test-$(KEY)
DOCS   := $(VENV)/.docs-$(KEY)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Tests start some fifty processes; without bytecode each would compile the package again, and pytest every test in every run.
test test-long: export PYTHONDONTWRITEBYTECODE :=

.PHONY: run demo test check test-long docs clean
run: demo
	$(BIN)/normwise compare cnn --json out/cnn/results.json --report out/cnn

demo: $(RUN)
	$(BIN)/normwise demo

test: $(TEST)
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 25

check: $(TEST)
	$(BIN)/ruff check src tests examples docs
	$(BIN)/mypy

test-long: $(TEST)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "long or not long"

# The site, into site/: it opens without a network.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS)
	$(BIN)/python docs/gallery.py --check
	$(BIN)/mkdocs build --strict

$(RUN):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[study,report]"
	rm -f $(VENV)/.run-* && touch $@

$(TEST):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
	rm -f $(VENV)/.run-* $(VENV)/.test-* $(VENV)/.docs-* && touch $@ $(RUN) $(DOCS)

$(DOCS):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[docs]"
	rm -f $(VENV)/.docs-* && touch $@

clean:
	rm -rf $(VENV) out site build src/*.egg-info
