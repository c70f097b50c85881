# make demo and make test each work alone, first, in an empty clone.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

.PHONY: demo test check clean

demo: $(VENV)/ready
	$(RUN)/loramox demo --out runs/demo --overwrite

test: $(VENV)/ready check
	$(RUN)/pytest

check: $(VENV)/ready
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/lint-imports

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet -c constraints.txt torch
	$(RUN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs
