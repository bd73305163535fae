# `make` or `make help` lists the targets. Each target installs what it needs; nothing has to be set up by hand.

PY_CANDIDATES := python3.11 python3 python3.12 python3.13
PY_CHECK := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(PY_CANDIDATES); do \
  if "$$p" -c '$(PY_CHECK)' >/dev/null 2>&1; then echo "$$p"; break; fi; done)
NO_PYTHON = volseg needs Python 3.11 or newer with its venv and ensurepip modules; \
  $(if $(PYTHON),$(PYTHON) is not that,none of $(PY_CANDIDATES) is). Install one, or name one: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python

VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
PURE := .venv-pure
EXAMPLES := .venv-examples
# What the pure layers and their tests need, and nothing more.
PURE_DEPS := hypothesis numpy pydantic pytest pytest-timeout pyyaml
PIP_INSTALL := bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PINS := pyproject.toml constraints.txt
CODE := $(wildcard volseg tests jobs deploy)
# Extra arguments: `make demo ARGS=--help`, `make test ARGS=tests/pure`.

# A foreign PYTHONPATH could hide the environment's own packages.
unexport PYTHONPATH

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-pure chaos examples lint format bench bench-submissions bench-scale clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-all ## install volseg and run the main job on a phantom (a few minutes)
	@$(BIN)/volseg demo $(ARGS)

test: $(VENV)/.installed-dev test-pure ## run all tests
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@# What is quick and in one process runs side by side; clusters, servers and measurements have the machine for themselves.
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not ray and not chaos and not examples'
	@$(BIN)/python -m pytest -m '(slow or ray) and not chaos and not examples'
endif

chaos: $(VENV)/.installed-dev ## run the long tests, which kill drivers, workers and machines
	@$(BIN)/python -m pytest -m chaos $(ARGS)

examples: $(VENV)/.installed-dev $(EXAMPLES)/.installed ## run the README's examples with Snakemake, Prefect and Dask
	@VOLSEG_EXAMPLES='$(CURDIR)/$(EXAMPLES)/bin' $(BIN)/python -m pytest -m examples $(ARGS)

test-pure: $(PURE)/.installed ## run the pure layers' tests without torch, ray and zarr
	@PYTHONPATH=. $(PURE)/bin/python -c 'import importlib.util as u, sys; \
	  found = [m for m in ("torch", "ray", "zarr") if u.find_spec(m)]; \
	  sys.exit("$(PURE) must not hold: " + ", ".join(found) if found else 0)'
	@PYTHONPATH=. $(PURE)/bin/python -m pytest tests/pure

lint: $(VENV)/.installed-dev ## check style, types, layers and the image
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy $(CODE)
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/hadolint deploy/Dockerfile

format: $(VENV)/.installed-dev ## rewrite the code in the project's style
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

bench: $(BENCH)/.installed ## compare volseg with its peers
	@$(BENCH)/bin/python -m tests.bench $(ARGS)

bench-submissions: $(VENV)/.installed-dev ## let eight processes submit one spec at the same moment, 50 times
	@$(BIN)/python -m tests.bench.submissions $(ARGS)

bench-scale: $(VENV)/.installed-dev ## simulate 1,000 workers, and run 20,000 tiny blocks on Ray
	@$(BIN)/python -m tests.bench.scale $(ARGS)

clean: ## remove caches and build products
	@rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environments too
	@rm -rf $(VENV) $(BENCH) $(PURE) $(EXAMPLES)

# pip is the last thing that venv makes: an environment without it was interrupted and is made again.
%/bin/pip:
	@'$(PYTHON)' -c '$(PY_CHECK)' 2>/dev/null || { echo '$(NO_PYTHON)' >&2; exit 1; }
	@'$(PYTHON)' -m venv $*

$(VENV)/.installed-all: $(PINS) | $(BIN)/pip
	@echo "installing volseg into $(VENV) (about 2 minutes the first time)"
	@$(VENV)/$(PIP_INSTALL) -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(PINS) | $(BIN)/pip
	@echo "installing volseg and its test tools into $(VENV) (about 2 minutes the first time)"
	@$(VENV)/$(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed-all $@

$(BENCH)/.installed: $(PINS) | $(BENCH)/bin/pip
	@echo "installing volseg and its peers into $(BENCH) (about 3 minutes the first time)"
	@$(BENCH)/$(PIP_INSTALL) -e '.[bench]'
	@touch $@

# Versions of their own: some of the tools want older packages than the rest.
$(EXAMPLES)/.installed: pyproject.toml tests/constraints-examples.txt | $(EXAMPLES)/bin/pip
	@echo "installing the workflow tools of the README's examples into $(EXAMPLES) (about 2 minutes the first time)"
	@$(EXAMPLES)/bin/python -m pip install -qq --disable-pip-version-check -c tests/constraints-examples.txt -e '.[examples]'
	@touch $@

# Without volseg itself: its dependencies would bring zarr. The tests find the package through PYTHONPATH.
$(PURE)/.installed: $(PINS) Makefile | $(PURE)/bin/pip
	@echo "installing the pure layers' needs into $(PURE) (a few seconds)"
	@$(PURE)/$(PIP_INSTALL) $(PURE_DEPS)
	@touch $@
