# This needs make and Python >= 3.11. The rest is installed into .venv, in the tested versions.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
WORKERS ?= 2
# A worker that is done takes over half of what another has left, so few fixtures of a file are made
# twice.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# The constraints hold for every pip here and for its build environments. From pip 25.3 on, a second
# variable sets those of build environments.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-long lint types docs docs-generate wheel mutants sanitize clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; set PYTHON")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## answer twelve questions about sample images, into build/demo
	rm -rf build/demo
	mkdir -p build/demo
	$(BIN)/idefics2 run -i examples/jobs/questions.jsonl --media-root examples/images \
	  -o build/demo/answers.jsonl --report build/demo/report.html --show 12

test: $(INSTALLED)  ## run the tests, on a GPU if there is one
	$(PYTEST) -m "not long"

test-long: $(INSTALLED)  ## run the tests that take long: the compiler, the Gluon kernels in the emulator, interrupts, killed jobs
	$(PYTEST) -m long $$(grep -rl mark.long tests --include='test_*.py' | sort)

lint: $(INSTALLED)  ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)  ## check types
	$(BIN)/mypy

docs: $(INSTALLED)  ## build site/ from docs/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-generate: $(INSTALLED)  ## write the tables of the pages from code and results
	PYTHONPATH=engine:kernels:bench:tests/helpers:tests/tools $(BIN)/python tests/tools/generate_docs.py

wheel: $(INSTALLED)  ## build dist/*.whl
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

mutants: $(INSTALLED)  ## break every plain Triton kernel on purpose and see its tests fail
	$(BIN)/python tests/tools/mutants.py --jobs $(WORKERS)

sanitize: $(INSTALLED)  ## run every kernel under compute-sanitizer (needs a GPU)
	$(BIN)/python tests/tools/sanitize.py

clean:  ## remove everything that was built, the environment too
	rm -rf .venv dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find engine kernels bench examples tests -name __pycache__ -type d -exec rm -rf {} +
