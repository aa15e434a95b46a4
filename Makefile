# `make demo` and `make test` need Python 3.11 or newer and nothing else: packages go to $(VENV), once, and again when
# pyproject.toml changes.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
comma := ,
SPATTEN := $(subst |,$(comma)spatten:,spatten:tokens=0.8|tokens=0.6|tokens=1.0$(comma)heads=0.8|tokens=1.0$(comma)heads=0.6|$\
	tokens=1.0$(comma)values=0.5|tokens=1.0$(comma)values=0.2|tokens=1.0$(comma)quantize=4+4)
PIP_FLAGS := --quiet --disable-pip-version-check --no-input

.PHONY: help demo demo-video demo-compare test matrix lint bench bench-gpu train quality clean

help:
	@echo "make demo       prune a small model and show what was pruned and what it saved"
	@echo "make demo-video  the same on a sample clip; make demo-compare: every method side by side"
	@echo "make test       the tests"
	@echo "make matrix     the wide matrix of families, attention implementations and inputs"
	@echo "make lint       ruff and mypy"
	@echo "make bench      latency on this machine, to bench/results and README (bench-gpu: to bench/results/gpu)"
	@echo "make quality    accuracy of the embedded model, dense and pruned, to bench/results and README"
	@echo "make train      train the embedded model from nothing, to $(OUT)/model"
	@echo "make clean      remove everything that was made here"

demo: $(VENV)/demo.stamp
	$(BIN)/python demos/image.py

demo-video: $(VENV)/demo.stamp
	$(BIN)/python demos/video.py

demo-compare: $(VENV)/demo.stamp
	$(BIN)/python demos/compare.py

test: $(VENV)/test.stamp
	$(BIN)/pytest

matrix: $(VENV)/test.stamp
	$(BIN)/pytest -m matrix

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test.stamp
	mkdir -p $(OUT)
	$(BIN)/pytest bench --benchmark-only --benchmark-json $(OUT)/bench.json
	$(BIN)/python bench/collect.py $(OUT)/bench.json
	$(BIN)/python bench/readme.py

bench-gpu: $(VENV)/test.stamp
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU here")'
	mkdir -p $(OUT)
	$(BIN)/pytest bench --benchmark-only --benchmark-json $(OUT)/bench-gpu.json
	$(BIN)/python bench/collect.py $(OUT)/bench-gpu.json --into bench/results/gpu

train: $(VENV)/test.stamp
	$(BIN)/python bench/quality/train.py --output $(OUT)/model
	$(BIN)/python bench/quality/train_vit.py --output $(OUT)/vit

quality: $(VENV)/test.stamp
	$(BIN)/python bench/quality/evaluate.py --output bench/results/quality.json
	$(BIN)/python bench/quality/evaluate.py --score exact --images 100 --keep 1,0.5 --methods $(SPATTEN) \
		--output bench/results/quality_spatten.json
	$(BIN)/python bench/quality/evaluate_vit.py --output bench/results/quality_vit.json
	$(BIN)/python bench/readme.py

# The newest of the extra's packages that pyproject.toml allows. What the tests need includes what the demo needs.
$(VENV)/%.stamp: pyproject.toml | $(BIN)/pip
	@echo "installing packages into $(VENV), about 6 GB the first time"
	$(BIN)/pip install $(PIP_FLAGS) --editable '.[$*]'
	@touch $@ $(if $(filter test,$*),$(VENV)/demo.stamp)

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; name one: make PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
