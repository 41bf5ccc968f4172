# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := build/quickstart
REQUEST := Turn on the bed light
# Conversations in held-out homes that each model is scored on.
EXAMPLES := 200
TOKENS := 344064
BYTES := 40MB
# More for efficientllm-train.
FLAGS ?=
# More for pytest, as: make test PYTEST_OPTIONS="-k gguf"
PYTEST_OPTIONS ?=
# make -n runs a line that names MAKE.
SELF = $(MAKE)
# llama-cpp-python is compiled without what it does not load: 82 s on two cores instead of five to six minutes.
COMPILED := CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/devices/llama_cpp_only.cmake $$CMAKE_ARGS"
# Without bytecode, both workers rewrite the assertions of every test file each time: seven seconds.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadgroup --max-worker-restart 0 --durations 20 $(PYTEST_OPTIONS)
# Per cent of the lines that the tests which are not slow run.
COVERAGE_FLOOR := 80

.PHONY: install quickstart quickstart-whole home-assistant site clients mlx readers android-runner board-wheel arm64-root test-arm64 stand-ins test test-fast coverage lint types measure imports clean FORCE

install: $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; run: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv $(VENV)

# pip 25.1 reads dependency groups. The pip of Python 3.11 to 3.13.4 is older, also in a .venv that the user made.
$(VENV)/.pip: | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

# The editable installation is a tree of links in build/, which tools can follow: made again where a module comes or goes.
build/modules.txt: FORCE
	@mkdir -p build
	@find train export runtime server devices -name '*.py' -o -path 'server/page/assets/*' -o -path 'export/phone/code/*' | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(VENV)/.installed: pyproject.toml build/modules.txt $(VENV)/.pip
	@echo "installing into $(VENV); llama-cpp-python is compiled the first time, which takes some minutes"
	@$(COMPILED) PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --group dev --editable '.[all,signing]' --config-settings editable_mode=strict
	@touch $@

$(VENV)/.lint: pyproject.toml $(VENV)/.pip
	@$(BIN)/python -m pip install --quiet --group lint
	@touch $@

# Our folders in the oldest transformers that reads plain ones, the oldest that reads irregular ones, the newest, and mlx-lm.
READERS := build/readers
READER_PACKAGES := transformers==4.57.6 transformers==5.14.0 transformers mlx-lm

$(READERS)/%/.installed:
	@$(PYTHON) -m venv $(@D)
	@case $* in mlx-lm) others='mlx[cpu]' ;; *) others='torch numpy' ;; esac && \
	$(@D)/bin/python -m pip install --quiet $* $$others
	@touch $@

# Tests find it there.
mlx: $(READERS)/mlx-lm/.installed

readers: install $(READER_PACKAGES:%=$(READERS)/%/.installed)
	EFFICIENTLLM_READERS=$$(ls -d $(CURDIR)/$(READERS)/*/bin/python | paste -sd:) $(BIN)/python -m pytest tests/test_other_readers.py

# Client libraries of OpenAI's API, which want other versions of our packages: tests/test_clients.py runs what is there.
CLIENTS := build/clients

clients: $(CLIENTS)/.installed

$(CLIENTS)/.installed: pyproject.toml
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(CLIENTS)/bin/python -m pip install --quiet --group clients
	@touch $@

# What the quickstart runs, without other runtimes, browsers and tools of development, and no bytecode of what is never imported.
$(VENV)/.quickstart: pyproject.toml build/modules.txt $(VENV)/.pip
	@if [ -f $(VENV)/.installed ]; then $(SELF) --no-print-directory install; else \
	  echo "installing into $(VENV); llama-cpp-python is compiled the first time, which takes some minutes"; \
	  $(COMPILED) PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-compile --group job --editable '.[train,export,gguf,server,bench,demo]' --config-settings editable_mode=strict; \
	fi
	@touch $@

# One job: home control in Home Assistant's own form. Chats, one run, a file, its score, and a lamp in a real Home Assistant.
quickstart: $(VENV)/.quickstart
	$(BIN)/python -m research.home.chats $(OUT)/data
	$(BIN)/efficientllm-train --preset job --batch-size 2 --chat-template research/home/template.jinja --tokens $(TOKENS) --target-bytes $(BYTES) $(FLAGS) --data $(OUT)/data/train.jsonl --output $(OUT)/run --overwrite
	$(BIN)/efficientllm-export $(OUT)/run --target gguf --quantize q4_0 --output $(OUT)/home --overwrite
	$(BIN)/python -m research.home.score $(OUT)/home --conversations $(EXAMPLES) --output $(OUT)/scores
	-@$(MAKE) --no-print-directory $(HASS)/.installed
	$(BIN)/python -m research.home.demo $(OUT)/home "$(REQUEST)"

# After make quickstart: the unpruned model, fine-tuned on the same tokens. Its rows join the table and the picture.
quickstart-whole: $(VENV)/.quickstart
	$(BIN)/efficientllm-train --functions learned --chat-template research/home/template.jinja --sequence-length 256 --batch-size 2 --learning-rate 4e-4 --tokens $(TOKENS) --prune none --no-quality --data $(OUT)/data/train.jsonl --output $(OUT)/whole --overwrite
	for type in q8_0 q4_0; do \
	  $(BIN)/efficientllm-export $(OUT)/whole --target gguf --quantize $$type --output $(OUT)/whole-$$type --overwrite && \
	  $(BIN)/python -m research.home.score $(OUT)/whole-$$type --conversations $(EXAMPLES) --output $(OUT)/scores || exit; \
	done

# A real Home Assistant with virtual devices, in an environment of its own. Its conversation agent is the quickstart's model.
HASS := build/home-assistant

$(HASS)/.installed:
	@python3.13 -c "" 2> /dev/null || { echo "Home Assistant needs Python 3.13, which is not here" >&2; exit 1; }
	@echo "installing Home Assistant into $(HASS)"
	@python3.13 -m venv $(HASS)
	@$(HASS)/bin/python -m pip install --quiet homeassistant==2026.2.3
	@# The first start installs packages of integrations, some after the demo wants them. Then the second start succeeds.
	@$(HASS)/bin/python research/home/host.py record $@ 2> /dev/null || $(HASS)/bin/python research/home/host.py record $@

home-assistant: $(VENV)/.quickstart $(HASS)/.installed
	$(BIN)/python -m research.home.demo $(OUT)/home

# The documents as pages, in build/site/html. mkdocs has an environment of its own. Broken links are errors.
SITE := build/site

$(SITE)/.installed: pyproject.toml
	@$(PYTHON) -m venv $(SITE)/venv
	@$(SITE)/venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(SITE)/venv/bin/python -m pip install --quiet --group docs .
	@npm pack --silent --pack-destination $(SITE) iframe-worker@1.0.4 && tar xzf $(SITE)/iframe-worker-1.0.4.tgz -C $(SITE)
	@touch $@

site: $(SITE)/.installed
	@$(SITE)/venv/bin/python -m pip install --quiet --no-deps --force-reinstall .
	$(SITE)/venv/bin/python tests/tools/site_pages.py $(SITE)/pages
	@cp $(SITE)/package/shim/index.js $(SITE)/pages/assets/iframe-worker.js
	NO_MKDOCS_2_WARNING=1 $(SITE)/venv/bin/mkdocs build --strict --quiet

# The program that efficientllm-bench --device adb pushes to a phone.
android-runner: install
	devices/build_android_runner.sh $(BIN)/python build/android-runner

# llama-cpp-python for 64-bit ARM boards, which efficientllm-bench --device ssh:// sends to them.
board-wheel: install
	devices/build_board_wheel.sh $(BIN)/python build/board-wheel

# The Debian that tests/test_arm64.py runs as a board; takes root's rights.
arm64-root:
	tests/tools/arm64_root.sh build/arm64

test-arm64: install board-wheel arm64-root
	EFFICIENTLLM_ARM64_ROOT=$(CURDIR)/build/arm64/root $(BIN)/python -m pytest tests/test_arm64.py

# ggml's kernels for SSE4.2, AVX2 and AVX-512: one x86 machine stands in for several devices.
stand-ins: install
	devices/build_stand_ins.sh $(BIN)/python build/stand-ins

test: install
	$(PYTEST)

test-fast: install
	$(PYTEST) -m "not slow and not gpu"

coverage: install
	$(PYTEST) -m "not slow and not gpu" --cov --cov-report=term:skip-covered --cov-fail-under=$(COVERAGE_FLOOR)

# Installs ruff and codespell, nothing else.
lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: install
	$(BIN)/pyright

# Lengths, annotations and comments of the code, as a table.
measure: $(BIN)/python
	@$(BIN)/python tests/tools/measure_code.py

# The import graph in docs/architecture.md.
imports: $(BIN)/python
	@$(BIN)/python tests/tools/import_graph.py

clean:
	rm -rf build $(VENV)
