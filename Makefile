# Everything a contributor runs. `make demo` and `make test` need python3, pip, venv and a C++ compiler.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CSRC := CMakeLists.txt $(shell find csrc -type f)
PIP = $(PY) -m pip install --quiet --disable-pip-version-check
PIP_INSTALL = $(PIP) -c constraints.txt
# The tests of ops and native code, found by the stem of what they test; "native", "properties" and
# "cuda_emulation" test all of it.
OP_STEMS := native properties cuda_emulation $(basename $(notdir $(shell find csrc/cpu csrc/cuda csrc/bindings vcr1_fast/ops -type f)))
OP_TESTS := $(wildcard $(addsuffix .py,$(addprefix python_tests/test_,$(sort $(OP_STEMS)))))
CLANG_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build demo test test-engines first-hour odd-media fuzz soak learn sanitize cuda-check lint format docs docs-site bench gpu-build gpu-check inplace clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Build tools first, pinned like the rest: an isolated build would fetch its own, unpinned.
$(VENV)/.built: $(VENV)/bin/python pyproject.toml constraints.txt $(CSRC)
	$(PIP_INSTALL) scikit-build-core pybind11 ninja cmake
	$(PIP_INSTALL) --no-build-isolation -e '.[train,report,dev]'
	touch $@

# What tests compare with and nobody else needs, in a separate folder: torchvision breaks
# transformers' imports when it was built for another torch. --no-deps, so each need is named.
ORACLE = torchvision rouge-score absl-py nltk six joblib regex tqdm defusedxml click jiwer rapidfuzz
$(VENV)/.oracle: $(VENV)/bin/python constraints.txt
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/oracle $(ORACLE)
	touch $@

# The release before the installed one, for which TRL's users still want the patch.
$(VENV)/.trl-previous: $(VENV)/bin/python
	$(PIP) --no-deps --upgrade --target $(VENV)/trl-previous trl==1.15.0
	touch $@

build: $(VENV)/.built  ## Install the package, editable, into .venv.

demo: $(VENV)/.built  ## Make clips, warm-start, train by GRPO, evaluate; writes runs/demo.
	$(PY) -m vcr1_fast.cli demo $(ARGS)

# The CUDA kernels for an emulated GPU (csrc/emulation), which runs on x86-64. PATH: cmake and ninja
# may be in the virtual environment alone.
EMULATION := $(if $(filter x86_64,$(shell uname -m)),build/emulation/.built)
CMAKE = PATH="$(abspath $(VENV))/bin:$$PATH" cmake
NATIVE_BUILD = -G Ninja -DVCR1_CUDA=OFF -DCMAKE_BUILD_TYPE=None -DPython_EXECUTABLE=$(abspath $(PY)) \
  -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir)
build/emulation/.built: $(VENV)/.built $(CSRC)
	$(CMAKE) -S . -B build/emulation -DVCR1_EMULATE=ON $(NATIVE_BUILD)
	$(CMAKE) --build build/emulation --parallel
	touch $@

test: $(VENV)/.built $(VENV)/.oracle $(VENV)/.trl-previous $(EMULATION)  ## Every test that this machine can run.
	VCR1_TORCHVISION=$(abspath $(VENV)/oracle) $(PY) -m pytest $(ARGS)
	# Triton kernels run on the CPU only in a process that never compiles them.
	TRITON_INTERPRET=1 $(PY) -m pytest -q -k triton $(OP_TESTS)
	# CUDA kernels run here in a process whose native module emulates a GPU.
	$(if $(EMULATION),VCR1_NATIVE=$$(ls $(CURDIR)/build/emulation/_C*.so) $(PY) -m pytest -q -k cuda $(OP_TESTS))
	$(if $(EMULATION),VCR1_NATIVE=$$(ls $(CURDIR)/build/emulation/_C*.so) $(PY) benches/gpu_check.py --emulate)
	PYTHONPATH=$(VENV)/oracle $(PY) -m pytest -q -k 'torchvision or transformers or rouge or jiwer' \
	  $(OP_TESTS) python_tests/test_text.py
	PYTHONPATH=$(VENV)/trl-previous TRITON_INTERPRET=1 $(PY) -m pytest -q \
	  python_tests/test_trl_patch.py python_tests/test_trl_video.py

# vLLM's CPU build (a third party's wheel) with this project's versions, in an environment apart:
# about 2 GB that `make test` does not need. Importing vLLM once compiles its Python files.
VENV_VLLM := .venv-vllm
VLLM_SITE = $(VENV_VLLM)/lib/python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')/site-packages
$(VENV_VLLM)/.built: engines.lock python_tests/torchvision_ops.py
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r engines.lock
	cp python_tests/torchvision_ops.py $(VLLM_SITE)
	echo 'import torchvision_ops' > $(VLLM_SITE)/torchvision_ops.pth
	VLLM_LOGGING_LEVEL=ERROR $(VENV_VLLM)/bin/python -c 'import vllm; vllm.LLM'
	touch $@

test-engines: $(VENV)/.built $(VENV_VLLM)/.built  ## Rollouts by vLLM on the CPU, against ours; fetches 2 GB at first.
	VCR1_ENGINES=1 VCR1_NATIVE=$$($(PY) -c 'import vcr1_fast._C as native; print(native.__file__)') \
	  PYTHONPATH=. $(VENV_VLLM)/bin/python -m pytest -q -W default -m vllm python_tests/test_vllm.py python_tests/test_vllm_server.py $(ARGS)

first-hour: $(VENV)/.built  ## What a new user does, in one go: all commands on two clips, in minutes.
	$(PY) python_tests/first_hour.py $(ARGS)

odd-media: $(VENV)/.built  ## Every file of the generator of odd and broken media (needs ffmpeg), minutes.
	VCR1_ODD_MEDIA=full $(PY) -m pytest -q python_tests/test_odd_media.py $(ARGS)

FUZZ ?= --seconds 60
fuzz: $(VENV)/.built  ## Parsers, records, decoders and native code on hostile inputs; FUZZ='--seconds 3600' for long.
	$(PY) python_tests/fuzz.py $(FUZZ)

SOAK ?= --minutes 60
soak: $(VENV)/.built  ## The demo's training, killed every minute, beside a run left alone; takes twice SOAK's minutes.
	$(PY) python_tests/soak.py $(SOAK)

learn: $(VENV)/.built  ## Each family learns from clips: fine-tuning, then GRPO, minutes a family.
	$(PY) python_tests/learn.py $(ARGS)

# Native code under AddressSanitizer and UBSan, in a separate build that VCR1_NATIVE names. The
# runtimes are preloaded because Python itself lacks them, and libstdc++ too, or they miss
# exceptions. Leaks are not searched: Python never frees everything. --capture=sys leaves the report,
# which a sanitizer writes before it ends the process, on the terminal.
SANITIZERS = $(foreach lib,libasan.so libubsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(lib)))
SANITIZED = LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=.
sanitize: $(VENV)/.built  ## The ops' tests, CUDA kernels emulated, on builds that trap memory errors and undefined behaviour.
	CXX=$(CXX) $(CMAKE) -S . -B build/sanitize -DVCR1_SANITIZE=ON $(NATIVE_BUILD)
	$(CMAKE) --build build/sanitize --parallel
	$(SANITIZED) VCR1_NATIVE=$$(ls $(CURDIR)/build/sanitize/_C*.so) \
	  $(PY) -m pytest -q --capture=sys -m "not gpu" $(OP_TESTS) $(ARGS)
ifneq ($(EMULATION),)
	CXX=$(CXX) $(CMAKE) -S . -B build/sanitize-emulation -DVCR1_SANITIZE=ON -DVCR1_EMULATE=ON $(NATIVE_BUILD)
	$(CMAKE) --build build/sanitize-emulation --parallel
	$(SANITIZED) VCR1_NATIVE=$$(ls $(CURDIR)/build/sanitize-emulation/_C*.so) \
	  $(PY) -m pytest -q --capture=sys -k cuda $(OP_TESTS) $(ARGS)
endif

cuda-check: $(VENV)/.built  ## What nvcc makes of each kernel (registers, spills, wide loads), if there is one; minutes.
	$(PY) csrc/cuda_resources.py --check

lint: $(VENV)/.built  ## Style, spelling and types of everything; changes nothing.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CLANG_FILES)
	$(PY) csrc/stubs.py --check
	$(VENV)/bin/codespell
	$(VENV)/bin/mypy

format: $(VENV)/.built  ## Rewrite every file in the project's style.
	$(PY) csrc/stubs.py
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CLANG_FILES)

docs: $(VENV)/.built  ## The pages of docs/ that the code writes.
	$(PY) docs/write_config.py
	$(PY) docs/write_scale.py
	$(PY) docs/write_models.py

# mkdocs has a virtual environment to itself: nothing else needs it.
docs-site: docs  ## The documentation as a site, in build/site; reads no network when it is viewed.
	$(PYTHON) -m venv build/mkdocs
	build/mkdocs/bin/python -m pip install -q 'mkdocs>=1.6,<2'
	build/mkdocs/bin/python -m mkdocs build

# What the benches compare with. Not part of the build: nothing else needs them.
$(VENV)/.peers: $(VENV)/.built
	$(PIP_INSTALL) --no-build-isolation -e '.[bench]'
	touch $@

bench: $(VENV)/.peers $(VENV)/.oracle  ## Op tables beside their peers on this machine, stored in benches/results.
	set -e; for bench in benches/bench_*.py; do \
	  VCR1_TORCHVISION=$(abspath $(VENV)/oracle) $(PY) $$bench $(ARGS); done

inplace:  ## Build the native module beside the sources, for PYTHON and the torch it has.
	cmake -S . -B build/inplace -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$$(which $(PYTHON)) \
	  -Dpybind11_DIR=$$($(PYTHON) -m pybind11 --cmakedir)
	cmake --build build/inplace --parallel
	cmake --install build/inplace --prefix .

gpu-build:  ## Compile the module with nvcc, for PYTHON, to be carried to a GPU machine (needs no GPU).
	$(PYTHON) benches/gpu_check.py --build-only $(ARGS)

gpu-check:  ## On a GPU machine, with its torch: small shapes, sanitizers, tests, benches in 12 minutes.
	$(PYTHON) benches/gpu_check.py $(ARGS)

clean:
	rm -rf build dist $(VENV) $(VENV_VLLM)
