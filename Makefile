# Two commands: `make demo` trains a humanoid to run and leaves the pictures, `make test` checks everything.
# Each makes .venv on first use. Variables:
#   PYTHON    the interpreter to build on (3.10, 3.11 or 3.12); found by itself
#   PIP_ARGS  extra arguments for pip, such as --index-url for torch wheels without CUDA (a few GB less)
#   TASK, ARGS         make demo TASK=hopper ARGS="--seeds 4"
#   PYTEST_ARGS        make test PYTEST_ARGS="-n 0 -k sampling"
VENV ?= .venv
PIP_ARGS ?=
TASK ?= humanoid
ARGS ?=
PYTEST_ARGS ?=

RIGHT_VERSION := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10 python; do \
	$$p -c '$(RIGHT_VERSION)' 2>/dev/null && echo $$p && break; done)
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*)

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(VENV)/bin/python -m pwm_fast.extract --task $(TASK) $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m "not slow" -n auto --maxprocesses 8 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

bench: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -q bench $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build *.egg-info pwm_fast/_native*.so pwm_fast/_native_unavailable.txt

# torch goes first and alone: it is by far the largest, and everything after it finds it in place.
$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "pwm_fast needs Python 3.10, 3.11 or 3.12; set PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch (the first time this takes some minutes)"
	$(PIP) torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(SOURCES)
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.installed
