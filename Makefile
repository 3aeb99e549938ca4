PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint gpu-check clean

# Fine-tune the embedded tiny BLOOM on READMEs, then show what it writes before and after.
demo: $(VENV)/.installed
	$(BIN)/python -m bloomft.demo

# Every test; without a CUDA device the Triton kernels run under Triton's interpreter.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto tests

# On a CUDA machine: every operator and the training job against float64 and timed beside its rivals, then every
# benchmark, kept under the device's name.
gpu-check: $(VENV)/.installed-dev
	$(BIN)/python -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "gpu-check needs a CUDA device")'
	device=$$($(BIN)/python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') && \
	$(BIN)/python -m benchmarks.gpu_check --out benchmarks/results/$$device && \
	$(BIN)/python -m pytest benchmarks --benchmark-only --full -s \
		--benchmark-json=benchmarks/results/$$device/benchmarks.json

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p lorakernels -p bloomft

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed
