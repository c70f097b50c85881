# make demo and make test each work alone, first, in an empty clone.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin

.PHONY: demo test check test-oldest test-llamacpp clean

demo: $(VENV)/ready
	$(RUN)/loramox demo --out runs/demo --overwrite

# A file of tests stays in one process: its fixtures are made once. Each process takes about 1 GB.
test: $(VENV)/ready check
	$(RUN)/pytest -n logical --maxprocesses 4 --dist loadfile

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

clean:
	rm -rf .venv .venv-oldest runs
