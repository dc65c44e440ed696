# The commands that people type. Everything is installed into .venv; only caches are written outside this folder.
# `make PYTHON=/path/to/python3.12 demo` selects the Python, `make VENV=folder demo` the environment.

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# The torch that `make lock` writes down: the everyday one, which is not always the newest that is tested.
TORCH ?= 2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# Without PYTHON: the first of these that is Python 3.11 or newer.
ifndef PYTHON
PYTHON := $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$name; break; fi; done)
endif

.PHONY: help demo check test suite test-oldest test-newest lock bench docs clean

help:
	@echo 'make demo    fine-tune the packaged model on 77 intents of bank customers (the first time: install it)'
	@echo 'make check   ruff, mypy and the quick tests, in a minute and a half'
	@echo 'make test    ruff, mypy and pytest'
	@echo 'make test-oldest, make test-newest'
	@echo '             pytest with the oldest and the newest libraries that are supported, in environments of their own'
	@echo 'make lock    write constraints.txt anew: the versions that make demo and make test install'
	@echo 'make bench   list the scripts that measure; make bench SCRIPT=name runs one'
	@echo 'make docs    regenerate the reference tables in docs/ and build the site into site/'
	@echo 'make clean   remove the environment and the caches; runs stay'

demo: $(VENV)/.demo
	$(BIN)/graftkit demo --overwrite

# Two workers of one thread each: the tests use tiny models, which do not gain from more threads. They and the processes
# that they start share compiled files, also where the environment says to write none.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist worksteal

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory suite

suite: $(VENV)/.dev
	$(PYTEST)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m 'not slow'

# Both ends of the ranges in pyproject.toml. Torch comes from pip's index there, on Linux with CUDA: some GB.
test-oldest test-newest: test-%: build/%.txt
	@$(MAKE) --no-print-directory suite VENV=.venv-$* CONSTRAINTS=$<

build/oldest.txt build/newest.txt: build/%.txt: pyproject.toml .ci/versions.py
	@mkdir -p build
	@$(PYTHON) .ci/versions.py $* > $@

# In an environment made for it, so that nothing of an older one is kept.
lock:
	@rm -rf build/lock
	@mkdir -p build
	@echo 'torch==$(TORCH)' > build/torch.txt
	@$(MAKE) --no-print-directory build/lock/.bench VENV=build/lock CONSTRAINTS=build/torch.txt EXTRAS=dev,bench,tested
	build/lock/bin/python -m pip freeze --exclude-editable > build/frozen.txt
	@$(PYTHON) .ci/versions.py lock < build/frozen.txt > constraints.txt
	@rm -rf build/lock

ifdef SCRIPT
bench: $(VENV)/.bench
	$(BIN)/python bench/$(basename $(notdir $(SCRIPT))).py $(ARGS)
else
bench:
	@echo 'make bench SCRIPT=name runs one of:'
	@for file in $(sort $(wildcard bench/*.py)); do \
		case $$file in bench/common.py) ;; \
		*) printf '  %-20s %s\n' "$$(basename $$file .py)" "$$(sed -n '1s/^"""//;1s/"""$$//;1p' $$file)";; esac; done
endif

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo 'Open site/index.html in a browser.'

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: each step is done once, and again when pyproject.toml or the constraints have changed.

$(VENV)/.created:
	@if [ -z "$(PYTHON)" ]; then \
		echo 'GraftKit needs Python 3.11 or newer, and none was found. Install one, or name it: make PYTHON=/path/to/python3.12 demo'; exit 1; fi
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo 'GraftKit needs Python 3.11 or newer, and $(PYTHON) is not. Name another: make PYTHON=/path/to/python3.12 demo'; exit 1; fi
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		echo '$(PYTHON) cannot make environments (its module venv or ensurepip is missing). On Debian or Ubuntu: apt install python3-venv'; exit 1; fi
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Torch comes first, alone: where pip is set up with a CPU build of it, that one is taken (2.13.0+cpu is newer than
# 2.13.0 to pip, and `==2.13.0` takes both), and the rest of the installation then leaves it alone.
$(VENV)/.torch: $(VENV)/.created pyproject.toml $(CONSTRAINTS)
	@echo 'Installing torch; the first time this can take some minutes.'
	@$(PIP) install --quiet -c $(CONSTRAINTS) "$$($(BIN)/python -c "import tomllib; print(next(d for d in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'] if d.startswith('torch')))")"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch
	@echo 'Installing GraftKit and what it needs.'
	$(PIP) install --quiet -c $(CONSTRAINTS) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch
	@echo 'Installing GraftKit, what it needs, and the tools of its tests.'
	$(PIP) install --quiet -c $(CONSTRAINTS) --editable '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.torch
	@echo 'Installing GraftKit and what the measurements need.'
	$(PIP) install --quiet -c $(CONSTRAINTS) --editable '.[$(or $(EXTRAS),bench)]'
	@touch $@ $(VENV)/.demo
