PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint clean

# Fine-tune the embedded tiny BLOOM on READMEs, then show what it writes before and after.
demo: $(VENV)/.installed
	$(BIN)/python -m bloomft.demo

# Every test; without a CUDA device the Triton kernels run under Triton's interpreter.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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
