# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := build/quickstart
QUESTION := What is the capital of France?

.PHONY: install quickstart android-runner test lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; run: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); llama-cpp-python is compiled, which takes some minutes"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

quickstart: install
	$(BIN)/efficientllm-train --preset cpu-quickstart --output $(OUT)/run --overwrite
	$(BIN)/efficientllm-export demo --target gguf --quantize q8_0 --output $(OUT)/source --overwrite
	$(BIN)/efficientllm-export $(OUT)/run --target gguf --quantize q8_0 --output $(OUT)/pruned --overwrite
	$(BIN)/efficientllm-chat $(OUT)/pruned "$(QUESTION)"
	$(BIN)/efficientllm-bench $(OUT)/source $(OUT)/pruned --json $(OUT)/bench.json

# The program that efficientllm-bench --device adb pushes to a phone.
android-runner: install
	devices/build_android_runner.sh $(BIN)/python build/android-runner

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf build $(VENV)
