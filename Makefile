# make demo: sample pictures with and without caching and see what it saves. make test: build and run every test.
# Each makes .venv, installs pinned dependencies and builds the kernels first (make env).

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
# test processes, of one thread each: more threads than cores only wait for each other
WORKERS ?= 2

.PHONY: env demo quality frontier test bench report doctor train clean

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
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreted -n $(WORKERS) -q
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS) -q

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
	rm -rf build dist out *.egg-info fastcache/lib fastcache/_C*.so
