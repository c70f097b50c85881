# make demo and make test each work alone, first, in an empty clone.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin

.PHONY: demo test test-fast check types coverage docs tree package gpu-check test-oldest test-llamacpp campaign clean

demo: $(VENV)/ready
	$(RUN)/loramox demo --out runs/demo --overwrite

# A file of tests stays in one process: its fixtures are made once. Each process takes about 1 GB. The files begin in the order
# of tests/conftest.py.
PYTEST := $(RUN)/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(VENV)/ready check
	$(PYTEST)

# Laws of tensors, rows and settings, and one trained run: for while you work on something.
FAST := algebra batches head losses metrics microbatches momentum packaging rows settings switch words
test-fast: $(VENV)/ready
	$(RUN)/pytest -n logical --maxprocesses 2 --dist loadfile $(FAST:%=tests/test_%.py)

check: $(VENV)/ready types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/lint-imports

types: $(VENV)/ready
	$(RUN)/mypy

coverage: $(VENV)/ready
	$(PYTEST) --cov --cov-report term:skip-covered --cov-report html:build/coverage

# Does the whole job run on the card here? Twenty minutes at most; GPU_CHECK="--model FOLDER_OR_HUB_ID" then checks that model, as long.
gpu-check: $(VENV)/ready
	$(RUN)/python -m recipes.bench.gpu_check $(GPU_CHECK)

# The site, in build/site. Warnings, such as a link that leads nowhere, are errors.
docs: $(VENV)/ready
	$(RUN)/mkdocs build --strict --quiet

# The tree in CONTRIBUTING.md, from the docstrings.
tree: $(VENV)/ready
	$(RUN)/python docs/tree.py

# The wheel as a user gets it: built, its metadata checked, and imported in an empty environment that borrows only the libraries.
package: $(VENV)/ready
	rm -rf build/package
	$(RUN)/python -m build --outdir build/package
	$(RUN)/twine check --strict build/package/*
	$(RUN)/python -m venv build/package/venv
	build/package/venv/bin/pip install --quiet --no-deps --no-index build/package/*.whl
	$(RUN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(echo build/package/venv/lib/python*/site-packages)/libraries.pth"
	cd build/package && venv/bin/python ../../tests/installed.py && venv/bin/loramox --help > /dev/null

# compat puts the clone on sys.path. Without it, `import loramox` in the folder above the clone finds the clone, not the package.
$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet -c $(CONSTRAINTS) torch
	$(RUN)/pip install --quiet -c $(CONSTRAINTS) --config-settings editable_mode=compat -e '.[test,docs]'
	touch $@

# The lower bounds of pyproject.toml. Not part of CI.
test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt test

# A LoRA GGUF in llama.cpp itself, whose converters are in the source of its Python package. Not part of CI: the first time
# it is built from that source, which takes about 10 minutes on one core and needs cmake and a C++ compiler.
test-llamacpp: $(VENV)/llamacpp/ready
	LLAMACPP_SOURCE=$(VENV)/llamacpp/vendor/llama.cpp $(RUN)/pytest -rP tests/llamacpp

$(VENV)/llamacpp/ready: | $(VENV)/ready
	rm -rf $(VENV)/llamacpp && mkdir $(VENV)/llamacpp
	$(RUN)/pip download --quiet -c $(CONSTRAINTS) --no-deps --no-binary llama-cpp-python -d $(VENV)/llamacpp llama-cpp-python
	tar -xzf $(VENV)/llamacpp/*.tar.gz -C $(VENV)/llamacpp --strip-components 1
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAVA_BUILD=OFF" \
		$(RUN)/pip install -c $(CONSTRAINTS) --no-binary llama-cpp-python llama-cpp-python sentencepiece
	touch $@

# Kill every command, fill its disk, start it twice, kill torchrun or one of two processes, and damage every file that it reads:
# 20 minutes, not part of CI. The first round tries every kind. No more than that: make campaign ARGS='--rounds 1'. The table is
# written to tests/campaign/results.
campaign: $(VENV)/ready
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(RUN)/python -m campaign $(ARGS)

clean:
	rm -rf .venv .venv-oldest build runs
