# One command per purpose. Everything lands in .venv; PYTHON names the interpreter that creates it (3.11 or newer).
#
# The stamps inside .venv remember what is installed, so a second call starts at once and a changed
# pyproject.toml installs again. Their names carry a checksum of this folder's path: a checkout that was copied
# or moved together with its .venv installs itself again instead of running the code it was copied from.

PYTHON ?= python3
WORKERS ?= 2
# Installed before the rest, so that nothing else chooses it. Where pip would bring gigabytes of CUDA packages for a
# machine without a GPU, give the address of the CPU builds to pip, or TORCH= to leave it out: its tests then skip.
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
HERE := $(shell pwd | cksum | cut -d' ' -f1)
DEMO_STAMP := $(VENV)/.kvpoll-demo-$(HERE)
FULL_STAMP := $(VENV)/.kvpoll-full-$(HERE)

# -P keeps this folder off sys.path: its room statemachine/ would hide the package of that name that bench measures.
RUN := $(VENV_PYTHON) -P -m
# mypy puts the folder that it starts in on its path, for the same reason it starts in src/.
TYPES := cd src && ../$(RUN) mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p kvpoll

.PHONY: help demo test engines lint format bench soak clean

help:
	@echo 'make demo     install what the demonstration needs and run it'
	@echo 'make test     lint, types and all tests (ARGS="-k lease" chooses tests, WORKERS=4 runs more at once)'
	@echo 'make engines  the tests of the real Mooncake and NIXL, in .venv-engines'
	@echo 'make lint     ruff check, ruff format --check, mypy --strict'
	@echo 'make format   let ruff rewrite what it can'
	@echo 'make bench    measure kvpoll beside its peers'
	@echo 'make soak     100,000 requests through real processes that are killed and stopped (ARGS="--requests 5000")'
	@echo 'make clean    remove caches and build leftovers (.venv stays; make test installs into it again)'
	@echo 'PYTHON=python3.12 makes .venv with another Python than python3'

demo: $(DEMO_STAMP)
	@$(VENV)/bin/kvpoll demo

bench: $(FULL_STAMP)
	@$(VENV)/bin/kvpoll bench

soak: $(FULL_STAMP)
	@$(VENV)/bin/kvpoll bench soak --out reports/soak.json --figure reports/figures/soak.png $(ARGS)

# The real Mooncake and NIXL, in an environment of their own. Mooncake needs libibverbs1 (Debian: with libnl-3-200 and
# libnl-route-3-200) and gets a network namespace that has only loopback, which its tests make themselves (unshare, ip).
ENGINES := .venv-engines
engines:
	@test -x $(ENGINES)/bin/python || '$(PYTHON)' -m venv $(ENGINES)
	@test -z '$(TORCH)' || $(ENGINES)/bin/python -m pip install -qq --disable-pip-version-check '$(TORCH)'
	@$(ENGINES)/bin/python -m pip install -qq --disable-pip-version-check -e '.[test,runtime,mooncake,nixl]'
	@$(ENGINES)/bin/python -P -m pytest -n $(WORKERS) tests/integration/test_engine_stories.py tests/integration/test_engine_conformance.py

# Leaves the names of the checks that failed in the shell variable 'failed'.
define CHECKS
failed=''; \
echo '+ ruff check .'; $(RUN) ruff check . || failed="$$failed ruff-check"; \
echo '+ ruff format --check .'; $(RUN) ruff format --check . || failed="$$failed ruff-format"; \
echo '+ mypy -p kvpoll'; ($(TYPES)) || failed="$$failed mypy"
endef

# Every check runs even if an earlier one failed, so one run shows everything; pytest's summary comes last.
test: $(FULL_STAMP)
	@$(CHECKS); \
	test -z "$$failed" || echo "lint failed:$$failed (the tests still run; make test will fail)"; \
	echo '+ pytest -n $(WORKERS) $(ARGS)'; $(RUN) pytest -n $(WORKERS) $(ARGS) || failed="$$failed pytest"; \
	test -z "$$failed"

lint: $(FULL_STAMP)
	@$(CHECKS); \
	test -z "$$failed" || { echo "lint failed:$$failed"; exit 1; }

format: $(FULL_STAMP)
	@$(RUN) ruff check --fix --quiet . ; $(RUN) ruff format .

clean:
	@rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@rm -f $(VENV)/.kvpoll-*
	@find spec statemachine sim runtime reports src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One quiet pip run each, tried three times because package indexes are sometimes briefly away.
define INSTALL_TORCH
	@test -z '$(TORCH)' || echo 'Installing $(TORCH) into $(VENV) (another minute) ...'
	@for attempt in 1 2 3; do \
		test -z '$(TORCH)' || $(VENV_PYTHON) -m pip install -qq --disable-pip-version-check '$(TORCH)' && exit 0; \
		echo "pip failed (attempt $$attempt of 3)" >&2; sleep $$attempt; \
	done; \
	echo 'torch could not be installed: the lines above are from pip; mend the cause, or leave it out: make test TORCH=' >&2; exit 1
endef

define INSTALL
	@echo 'Installing kvpoll[$(EXTRAS)] into $(VENV) (about a minute the first time) ...'
	@for attempt in 1 2 3; do \
		$(VENV_PYTHON) -m pip install -qq --disable-pip-version-check -e '.[$(EXTRAS)]' && exit 0; \
		echo "pip failed (attempt $$attempt of 3)" >&2; sleep $$attempt; \
	done; \
	echo 'kvpoll could not be installed: the lines above are from pip; mend the cause and run make again.' >&2; exit 1
endef

$(DEMO_STAMP): EXTRAS := reports
$(DEMO_STAMP): pyproject.toml Makefile $(VENV)/pyvenv.cfg
	$(INSTALL)
	@touch '$@'

$(FULL_STAMP): EXTRAS := test,lint,transitions,reports,bench,runtime
$(FULL_STAMP): pyproject.toml Makefile $(VENV)/pyvenv.cfg
	$(INSTALL_TORCH)
	$(INSTALL)
	@touch '$(DEMO_STAMP)' '$@'

# Asked before venv starts, because a venv that fails halfway leaves a broken folder and ten lines of output.
$(VENV)/pyvenv.cfg:
	@'$(PYTHON)' -c '' 2>/dev/null || { \
		echo "kvpoll needs Python 3.11 or newer, and '$(PYTHON)' does not run: install Python, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "kvpoll needs Python 3.11 or newer, and '$(PYTHON)' is $$('$(PYTHON)' --version 2>&1): name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make a virtual environment: install the Debian/Ubuntu package python3-venv (apt install python3-venv)" >&2; exit 1; }
	@echo 'Creating $(VENV) with $(PYTHON) ...'
	@'$(PYTHON)' -m venv --clear $(VENV) || { rm -f '$@'; exit 1; }
