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
# What the pure layers and their tests need, and nothing more.
PURE_DEPS := hypothesis numpy pydantic pytest pytest-timeout pyyaml
PIP_INSTALL := bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PINS := pyproject.toml constraints.txt
CODE := $(wildcard volseg tests jobs)
# Extra arguments: `make demo ARGS=--help`, `make test ARGS=tests/pure`.
ARGS ?=

# A foreign PYTHONPATH could hide the environment's own packages.
unexport PYTHONPATH

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-pure lint format bench clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-all ## install volseg and run the main job on a phantom (a few minutes)
	@$(BIN)/volseg demo $(ARGS)

test: $(VENV)/.installed-dev test-pure ## run all tests
	@$(BIN)/python -m pytest $(ARGS)

test-pure: $(PURE)/.installed ## run the pure layers' tests without torch, ray and zarr
	@PYTHONPATH=. $(PURE)/bin/python -c 'import importlib.util as u, sys; \
	  found = [m for m in ("torch", "ray", "zarr") if u.find_spec(m)]; \
	  sys.exit("$(PURE) must not hold: " + ", ".join(found) if found else 0)'
	@PYTHONPATH=. $(PURE)/bin/python -m pytest tests/pure

lint: $(VENV)/.installed-dev ## check style, types and layers
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy $(CODE)
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed-dev ## rewrite the code in the project's style
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

bench: $(BENCH)/.installed ## compare volseg with its peers
	@$(BENCH)/bin/python -m tests.bench $(ARGS)

clean: ## remove caches and build products
	@rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environments too
	@rm -rf $(VENV) $(BENCH) $(PURE)

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

# Without volseg itself: its dependencies would bring zarr. The tests find the package through PYTHONPATH.
$(PURE)/.installed: $(PINS) Makefile | $(PURE)/bin/pip
	@echo "installing the pure layers' needs into $(PURE) (a few seconds)"
	@$(PURE)/$(PIP_INSTALL) $(PURE_DEPS)
	@touch $@
