# make demo and make test each work alone, first, in an empty clone.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin

.PHONY: demo test check test-oldest clean

demo: $(VENV)/ready
	$(RUN)/loramox demo --out runs/demo --overwrite

test: $(VENV)/ready check
	$(RUN)/pytest

check: $(VENV)/ready
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/lint-imports

$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet -c $(CONSTRAINTS) torch
	$(RUN)/pip install --quiet -c $(CONSTRAINTS) -e '.[test]'
	touch $@

# The lower bounds of pyproject.toml. Not part of CI.
test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt test

clean:
	rm -rf .venv .venv-oldest runs
