# make env        sets up .venv with pinned dependencies and builds the kernels; every other target does so first
# make demo       samples pictures with and without caching, and says what it saves
# make test       the tests, under 9 minutes on two cores
# make test-fast  of every test that is quick its first rows, under 90 seconds
# make test-full  what `make test` leaves out: whole matrices, long builds; the two together run every test
# make check      format, lint, types, C++ format, shell
# make format     formats Python, C++ and CUDA, and corrects what the linter can
# make hooks      runs the checks before every commit (pre-commit)
# make types-baseline  lowers the allowed numbers of type errors after some were corrected
# make quality, frontier, bench, report, doctor, train  see README.md and benchmarks/README.md
# make clean      removes what was built and written

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CLANG_FORMATTED = $(shell find csrc tests/emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# test processes, of one thread each: more threads than cores only wait for each other
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) tests/interpreted

.PHONY: env demo quality frontier test test-fast test-full check format hooks types-baseline
.PHONY: bench report doctor train clean

env: $(VENV)/built

$(VENV)/created:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/created requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" -r requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: env
	$(BIN)/fastcache demo --out out/demo

quality: env
	$(BIN)/fastcache quality --out out/quality

# every policy over a grid of settings; over an hour, goes on where it was stopped
frontier: env
	OMP_WAIT_POLICY=passive $(BIN)/fastcache frontier --out out/frontier

test: env
	$(INTERPRETED) -m "not full"
	$(PYTEST) tests -m "not full"

test-fast: env
	$(PYTEST) tests -m "not full and not slow" --rows 1

test-full: env
	$(INTERPRETED) -m full
	$(PYTEST) tests -m full

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@echo clang-format --dry-run -Werror, csrc and tests/emulator
	@$(BIN)/clang-format --dry-run -Werror $(CLANG_FORMATTED)
	$(BIN)/shellcheck .ci/run benchmarks/*.sh
	$(BIN)/python .ci/type_ratchet.py

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CLANG_FORMATTED)

hooks: env
	$(BIN)/pre-commit install

types-baseline: env
	$(BIN)/python .ci/type_ratchet.py --write

bench: env
	$(BIN)/python -m benchmarks.run --out out/bench

# tables and rooflines of the GPU runs that are committed under benchmarks/results
report: env
	$(BIN)/python -m benchmarks.gate.report --out out/report

doctor: env
	$(BIN)/fastcache doctor --verify

train: env
	$(BIN)/python -m fastcache.workshop.glyphs.train --out weights/glyph-dit.safetensors
	$(BIN)/python -m fastcache.workshop.glyphs.classifier --out weights/glyph-classifier.safetensors

clean:
	rm -rf build dist out *.egg-info .mypy_cache .ruff_cache fastcache/lib fastcache/_C*.so
