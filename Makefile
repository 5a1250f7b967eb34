# Everything runs in .venv, made on first use. It holds torch once: the package is built against that
# torch (--no-build-isolation) instead of downloading a second one for the build.
PYTHON ?= python3
OUT ?= demo-output
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)
USERS_PATH := $(PATH)
export PATH := $(CURDIR)/$(BIN):$(PATH)
# OpenMP threads that wait spin for a moment, then sleep. If they slept at once, a quiet machine would lose half its
# speed; if they never did, a busy one nearly all of it.
export GOMP_SPINCOUNT := 20000
# Files in the order of their names: by default those with few tests come last, and the longest would then run alone.
TWO_FILES_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint bench gpu package-check clean

demo: $(VENV)/.demo
	$(BIN)/talos-fast demo --out $(OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest tests -q $(TWO_FILES_AT_A_TIME)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict talos_fast
	$(BIN)/clang-format --dry-run -Werror csrc/* tests/*.h tests/*.cpp tests/emulated_cuda/*.h tests/emulated_cuda/*.cpp

bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks/ --benchmark

# On a machine with a GPU, with the Python that is there: see the script. PARTS="build table" runs some of it.
gpu: export PATH := $(USERS_PATH)
gpu:
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh $(PARTS)

package-check: $(VENV)/.test
	PYTHON=$(BIN)/python bash .ci/package_check.sh

clean:
	rm -rf $(VENV) build dist *.egg-info talos_fast/*.so

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "setuptools>=77" wheel ninja numpy "torch>=2.11"
	touch $@

# One stamp an extra; each installs the same editable package, so they live side by side.
$(VENV)/.%: $(VENV)/.torch $(SOURCES)
	$(INSTALL) --no-build-isolation -e '.[$*]'
	touch $@
