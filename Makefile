# make test: install into .venv, then linters, types and tests (what CI runs)
# make demo: install, then export a random-weight model and let it answer a spoken question
# make wren: train Wren from nothing (hours; it goes on where it stopped), export it and ask it questions. CORES=1: no
#     part is trained by two processes
# make docs: write the pages that come from the code
# make serve-check: the web page of `omniport serve` in Chromium, which has to be installed; the clients of others, one
#     of them in Node; schemathesis over /openapi.json; replicas under Ray Serve; and 500 hostile clients
#     (docs/results/serve-check.md)
# make gpu-check: install what the GPU found here can use, run the tests that need one, then measure it
#     (docs/results/gpu-NAME.json)
# make fuzz: mutated files, messages, arguments and turns for an hour (docs/results/fuzz.md)
# make kills: kill export, quantize, calibrate, run and deploy at 300 random moments, and look at what they leave
# make extras: resolve every extra for Python 3.10 to 3.14 on Linux (x86-64, aarch64) and Windows, from wheels
# make install-check: install both ONNX Runtimes in every order, and mend them as doctor says (docs/results/install-check.md)
# make aarch64-check: a whole reply on a 64-bit Arm machine under emulation, with nothing installed here (docs/results/aarch64.md)
# make tensorrt-contract: compare what was recorded of TensorRT's Python modules (10.3 to 11.4) with the real bindings
# make build-matrix: build the engines of real-width graphs for several GPUs, without one (docs/results/build-matrix.md)
# make bench-check: measure the real-width model and compare its ratios with docs/results/bench.json, within a noise band

SYSTEM_PYTHON := $(shell command -v python3.11 || command -v python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: test lint types types-windows demo wren docs fuzz kills extras install-check aarch64-check tensorrt-contract build-matrix bench-check gpu-check serve-check clean
.DEFAULT_GOAL := test

$(PYTHON):
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip

# Reinstalled when pyproject.toml or the tested versions change. torch comes first, so that the build asked for is the one that stays.
# Python compiles what it imports: a part of what is installed, so half of the time is saved.
$(INSTALLED): pyproject.toml tests/constraints.txt | $(PYTHON)
	$(PYTHON) -m pip install --quiet --no-compile torch==2.13.0
	$(PYTHON) -m pip install --quiet --no-compile --constraint tests/constraints.txt -e '.[test]'
	$(PYTHON) -m scripts.install_backends
	touch $@

# what users run, as Windows sees it
USED := -p omniport.runtime -p omniport.serve -p omniport.export -p omniport.calib -p omniport.cli

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(MAKE) --no-print-directory --jobs 2 types types-windows

types: $(INSTALLED)
	$(VENV)/bin/mypy

# its own cache: one for both platforms would be written anew each time
types-windows: $(INSTALLED)
	$(VENV)/bin/mypy --platform win32 --cache-dir .mypy_cache/windows $(USED)

test: lint
	$(PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

extras: $(INSTALLED)
	$(PYTHON) -m scripts.check_extras

install-check: $(INSTALLED)
	$(PYTHON) -m benchmarks.install_check

# extras, doctor, build --check and a reply on a 64-bit Arm machine under emulation
aarch64-check: $(INSTALLED)
	$(PYTHON) -m benchmarks.aarch64

tensorrt-contract: $(INSTALLED)
	$(PYTHON) -m pytest -q -m network tests/export/tensorrt/test_recorded.py

demo: $(INSTALLED)
	$(PYTHON) -m scripts.demo

WREN := .work/wren

# of a machine for Wren's vision encoder, thinker and talker, which take the longest
CORES := 2
TOGETHER := $(VENV)/bin/torchrun --standalone --nproc-per-node $(CORES)

# The parts from vocoder on need not wait for each other's speech: `thinker` may run beside `vocoder` and `dit`.
wren: $(INSTALLED)
	@command -v flite >/dev/null || { echo "Wren's sentences are spoken by flite: apt-get install flite"; exit 1; }
	$(PYTHON) -m pip install --quiet -e '.[wren]'
	$(PYTHON) -m wren.speech_data replies --work $(WREN)
	$(PYTHON) -m wren.speech_data questions --work $(WREN)
	$(PYTHON) -m wren.codes --work $(WREN)
	$(PYTHON) -m wren.vocoder --work $(WREN)
	$(PYTHON) -m wren.dit --work $(WREN)
	$(TOGETHER) -m wren.vision --work $(WREN)
	$(TOGETHER) -m wren.thinker --work $(WREN)
	$(TOGETHER) -m wren.talker --work $(WREN)
	$(PYTHON) -m wren.assemble --work $(WREN)
	rm -rf $(WREN)/bundle
	$(VENV)/bin/omniport export wren/checkpoint $(WREN)/bundle
	$(PYTHON) -m wren.evaluate $(WREN)/bundle --work $(WREN) --reference wren/checkpoint
	$(PYTHON) -m wren.evaluate $(WREN)/bundle --work $(WREN) --kinds spoken,picture_spoken --pauses
	$(PYTHON) -m wren.assemble --work $(WREN)  # once more: the model card gets the figures

docs: $(INSTALLED)
	$(PYTHON) -m scripts.make_docs

FUZZ_SECONDS := 3600

fuzz: $(INSTALLED)
	$(PYTHON) -m scripts.fuzz --seconds $(FUZZ_SECONDS)

TINY := .work/tiny

$(TINY): | $(INSTALLED)
	$(VENV)/bin/omniport make-checkpoint $@ --size tiny

$(TINY)-fp32: | $(TINY)
	$(VENV)/bin/omniport export $(TINY) $@

# of each of the six cases
KILLS := 50

kills: $(INSTALLED) $(TINY)-fp32
	$(PYTHON) -m scripts.kills --checkpoint $(TINY) --bundle $(TINY)-fp32 --kills $(KILLS) --page

MATRIX := .work/small

$(MATRIX): | $(INSTALLED)
	$(VENV)/bin/omniport make-checkpoint $@ --size small

CALIB := .work/small.calib
RECIPES := int8,w8,int4,fp8,edge-8gb,edge-16gb

$(CALIB): | $(MATRIX)
	$(VENV)/bin/omniport calibrate --sample-data .work/samples
	$(VENV)/bin/omniport calibrate $(MATRIX) $@ --data .work/samples/calib.jsonl --max-speech 0.8

build-matrix: $(INSTALLED) $(CALIB)
	$(PYTHON) -m benchmarks.build_matrix $(MATRIX) --work .work/matrix --calib $(CALIB) --recipes $(RECIPES)

$(MATRIX)-fp32: | $(MATRIX)
	$(VENV)/bin/omniport export $(MATRIX) $@

bench-check: $(INSTALLED) $(MATRIX)-fp32
	$(PYTHON) -m benchmarks.bench_check $(MATRIX)-fp32 $(MATRIX)

gpu-check: $(INSTALLED)
	$(PYTHON) -m scripts.install_backends --gpu-check
	$(PYTHON) -m pytest -q -m gpu tests/benchmarks/test_gpu.py
	@if command -v compute-sanitizer; then compute-sanitizer --tool memcheck --error-exitcode 9 \
		$(PYTHON) -m pytest -q -m gpu tests/benchmarks/test_gpu.py -k "not tiny_on_the_gpu and not waiting"; fi
	$(PYTHON) -m benchmarks.gpu_check

serve-check: $(INSTALLED)
	$(PYTHON) -m benchmarks.serve_check

clean:
	rm -rf $(VENV) demo build .mypy_cache .pytest_cache .ruff_cache
