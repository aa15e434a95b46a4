# `make demo` and `make test` need Python 3.11 or newer and nothing else: the packages of $(LOCK), to the last hash, go
# to $(VENV), once, and again when the lock or pyproject.toml changes. `make lock` alone asks what is newest.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
LOCK := locks/test.txt
READY := $(VENV)/ready.stamp
UV := build/uv
comma := ,
SPATTEN := $(subst |,$(comma)spatten:,spatten:tokens=0.8|tokens=0.6|tokens=1.0$(comma)heads=0.8|tokens=1.0$(comma)heads=0.6|$\
	tokens=1.0$(comma)values=0.5|tokens=1.0$(comma)values=0.2|tokens=1.0$(comma)quantize=4+4)
PIP_FLAGS := --quiet --disable-pip-version-check --no-input

.PHONY: help demo demo-video demo-compare test matrix minors lock lint bench bench-gpu train quality clean

help:
	@echo "make demo       prune a small model and show what was pruned and what it saved"
	@echo "make demo-video  the same on a sample clip; make demo-compare: every method side by side"
	@echo "make test       the tests"
	@echo "make matrix     the wide matrix of families, attention implementations and inputs"
	@echo "make minors     the families on every minor of transformers supported, oldest and newest timm and torch, to README"
	@echo "make lint       ruff and mypy"
	@echo "make lock       the newest packages that pyproject.toml and locks/held.txt allow, with hashes, to $(LOCK)"
	@echo "make bench      latency on this machine, to bench/results and README (bench-gpu: to bench/results/gpu)"
	@echo "make quality    accuracy of the embedded model, dense and pruned, to bench/results and README"
	@echo "make train      train the embedded model from nothing, to $(OUT)/model"
	@echo "make clean      remove everything that was made here"

demo: $(READY)
	$(BIN)/python demos/image.py

demo-video: $(READY)
	$(BIN)/python demos/video.py

demo-compare: $(READY)
	$(BIN)/python demos/compare.py

test: $(READY)
	$(BIN)/pytest

matrix: $(READY)
	$(BIN)/pytest -m matrix

# Versions other than the locked ones are installed beside them, into build/minors (torch: 5 GB).
minors: $(READY)
	$(BIN)/python bench/minors.py --output bench/results/minors.json
	$(BIN)/python bench/readme.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	mkdir -p $(OUT)
	$(BIN)/pytest bench --benchmark-only --benchmark-json $(OUT)/bench.json
	$(BIN)/python bench/collect.py $(OUT)/bench.json
	$(BIN)/python bench/readme.py

bench-gpu: $(READY)
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU here")'
	mkdir -p $(OUT)
	$(BIN)/pytest bench --benchmark-only --benchmark-json $(OUT)/bench-gpu.json
	$(BIN)/python bench/collect.py $(OUT)/bench-gpu.json --into bench/results/gpu

train: $(READY)
	$(BIN)/python bench/quality/train.py --output $(OUT)/model
	$(BIN)/python bench/quality/train_vit.py --output $(OUT)/vit

quality: $(READY)
	$(BIN)/python bench/quality/evaluate.py --output bench/results/quality.json
	$(BIN)/python bench/quality/evaluate.py --score exact --images 100 --keep 1,0.5 --methods $(SPATTEN) \
		--output bench/results/quality_spatten.json
	$(BIN)/python bench/quality/evaluate_vit.py --output bench/results/quality_vit.json
	$(BIN)/python bench/readme.py

# One environment for the demo and the tests: what the tests need includes what the demo needs. The package itself is no
# part of the lock; setuptools, which builds it, is.
$(READY): $(LOCK) pyproject.toml | $(BIN)/pip
	@echo "installing the packages of $(LOCK) into $(VENV), about 6 GB the first time"
	$(BIN)/pip install $(PIP_FLAGS) --require-hashes --requirement $(LOCK)
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --no-build-isolation --editable .
	@touch $@

# Resolved for every platform and every Python at once, so that one file serves all; on Linux the CUDA build of torch is
# the one that the registry has for machines with and without a GPU. uv is no part of the project: it gets a folder of
# its own.
lock: | $(UV)/bin/uv
	$(UV)/bin/uv pip compile --quiet --upgrade --universal --fork-strategy fewest --python-version 3.11 \
		--generate-hashes --no-emit-index-url --custom-compile-command 'make lock' \
		--extra test --constraint locks/held.txt --output-file $(LOCK) pyproject.toml

$(UV)/bin/uv: | $(UV)/bin/pip
	$(UV)/bin/pip install $(PIP_FLAGS) uv

$(BIN)/pip $(UV)/bin/pip: %/bin/pip:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; name one: make PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv $*

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
