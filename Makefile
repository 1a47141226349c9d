# minidiff: `make demo` and `make test` set up what they need. `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := runs/demo
EXTRA  := $(BIN)/pip install --quiet --disable-pip-version-check# minidiff is there: only what an extra adds is fetched

.PHONY: help setup demo test lint bench notebooks lab gpu-build gpu-test gpu-bench clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18

$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "minidiff needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

setup: $(VENV)/.ready  ## make a virtual environment in .venv and install minidiff into it

demo: setup  ## train on shapes for a few minutes, then score and draw held-out captions: runs/demo/
	@if [ -e $(DEMO)/checkpoint.safetensors ]; \
		then $(BIN)/minidiff train --resume $(DEMO); \
		else $(BIN)/minidiff train shapes --out $(DEMO); fi
	@$(BIN)/minidiff evaluate $(DEMO)

test: setup  ## run the tests (no PyTorch needed)
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: setup  ## check style and types
	$(EXTRA) 'minidiff[lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## measure everything, against PyTorch where it is installed: benchmarks/results/ (half an hour)
	@$(BIN)/python -c 'import torch, diffusers' 2>/dev/null || \
		echo "without PyTorch's columns; for them: $(BIN)/pip install --editable '.[compare]'"
	@for b in conv2d groupnorm attention linear adamw; do $(BIN)/python benchmarks/bench_$$b.py || exit 1; done
	@$(BIN)/python benchmarks/bench_conv2d.py --ways
	@if $(BIN)/python -c 'import torch, diffusers' 2>/dev/null; then $(BIN)/python benchmarks/summarise.py && \
		$(BIN)/python benchmarks/bench_unet.py && $(BIN)/python benchmarks/bench_profile.py; fi

notebooks: setup  ## execute all notebooks and write them with their outputs
	$(EXTRA) 'minidiff[notebooks]'
	$(BIN)/python notebooks/build.py

lab: setup  ## open the notebooks in JupyterLab
	$(EXTRA) 'minidiff[lab]'
	$(BIN)/jupyter lab --notebook-dir=notebooks

# On a machine with a GPU, with its own Python: numpy, cupy, pytest, pybind11, ninja and nvcc are all it needs, and torch
# for the benchmarks.
GPU_TESTS := $(addprefix tests/test_,gpu.py sizes.py contract.py attention.py conv2d.py diffusion.py elementwise.py \
	geglu.py gelu.py groupnorm.py layernorm.py linear.py mse.py optim.py random.py silu.py)
GPU_PYTEST := -m pytest --require-gpu -W default
SANITIZE := compute-sanitizer --error-exitcode 1 --target-processes all --report-api-errors no --kernel-name kns=minidiff

gpu-build:
	MINIDIFF_MODULES=_cuda,_emulated \
		MINIDIFF_ARCHITECTURES=$$($(PYTHON) -c 'import cupy; print(cupy.cuda.Device().compute_capability)') \
		$(PYTHON) setup.py in-place
	$(PYTHON) -c 'import minidiff._cuda'

gpu-test: gpu-build  ## test the CUDA kernels on a GPU, then memcheck and racecheck on small shapes
	CUDA_LAUNCH_BLOCKING=1 $(PYTHON) $(GPU_PYTEST) --maxfail=40 $(GPU_TESTS) -k "cuda or gpu"
	$(PYTHON) $(GPU_PYTEST) tests/test_streams.py
	for tool in memcheck racecheck; do $(SANITIZE) --tool $$tool $(PYTHON) $(GPU_PYTEST) tests/test_gpu.py \
		-k test_a_rung_is_right || exit 1; done

gpu-bench: gpu-build  ## measure the CUDA kernels beside PyTorch: benchmarks/results/DEVICE/
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_agreement.py
	PYTHONPATH=. $(PYTHON) benchmarks/bench_gpu_steps.py --seconds 180
	PYTHONPATH=. $(PYTHON) benchmarks/bench_gpu.py --seconds 180

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) build minidiff/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
