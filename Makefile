# `make try`, `make demo` and `make test` are all that a newcomer needs. Each makes .venv first; nothing here needs root.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help try demo reproduce test test-all test-slurm slurm-up slurm-down base doctor lint clean

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv/bin/python
INSTALLED := .venv/.installed
# As packages are built by wheels everywhere, Debian's older pip has no deprecations to tell of.
PIP := $(VENV) -m pip --disable-pip-version-check --quiet install --use-pep517
TESTED := .venv/.installed-test
# A file's tests stay together, as they share what they make; two workers, or one a processor up to four. The longest
# files come first (tests/conftest.py).
PYTEST := -rs -n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
COVERAGE := .coverage_data
# What `make test-all` is measured by; MEASURE= leaves it out.
MEASURE := -m coverage run

help: ## show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

try: $(INSTALLED) ## one minute: a shipped tiny model answers three clips, in runs/try/report.html
	@$(VENV) -m eval.try_it

demo: $(INSTALLED) ## synthesise data, train, evaluate, write runs/demo/report.html; model=omni3: a tiny Qwen3-Omni
	@$(VENV) -m eval.demo $(if $(model),--model $(model))

reproduce: $(INSTALLED) ## the paper in small: all systems, sweeps, tables and figures into runs/tiny/report.html
	@$(VENV) slurm/reproduce.py profile=tiny

test: $(TESTED) ## something of every part, in minutes
	@$(VENV) -m pytest $(PYTEST) -m "(not slow or core) and not slurm and not gpu"

test-all: $(TESTED) ## all that needs neither Slurm nor a GPU, and which lines and branches it ran
	@rm -rf $(COVERAGE) && status=0 && \
	  $(VENV) $(MEASURE) -m pytest $(PYTEST) -m "not slurm and not gpu" || status=$$?; [ -n "$(MEASURE)" ] || exit $$status; \
	{ $(VENV) -m coverage combine --quiet && $(VENV) -m tests.covered; } || status=$$((status ? status : 1)); exit $$status

test-slurm: $(TESTED) ## real jobs on a Slurm of this machine; installs Debian's packages where it may
	@command -v slurmctld /usr/sbin/slurmctld >/dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends slurm-wlm munge; \
	else echo 'error: Slurm is not installed: apt install slurm-wlm munge' >&2; exit 1; fi
	@$(VENV) -m pytest tests/slurm $(PYTEST) -m slurm --durations=0 --durations-min=1

slurm-up: $(INSTALLED) ## start a Slurm of four make-believe nodes on this machine
	@$(VENV) slurm/local/cluster.py up
	@echo 'now type: source <($(VENV) slurm/local/cluster.py env)'

slurm-down: $(INSTALLED) ## end it
	@$(VENV) slurm/local/cluster.py down

base: $(INSTALLED) ## pretrain the demo's tiny base anew, and put it to the gate; model=omni3: that of the tiny Qwen3-Omni
	@$(VENV) -m data_tools.pretrain $(if $(model),--family $(model))
	@for more in "b --steps 1200 --clips 2000" "c --steps 800 --clips 1500"; do \
	  $(VENV) -m data_tools.pretrain $(if $(model),--family $(model)) --start assets/tiny_$(or $(model),base) \
	    --on-ladder 0.5 --run $$more || exit $$?; done
	@$(VENV) -m bench.world $(if $(model),--family $(model))

doctor: $(INSTALLED) ## what this machine can run, and what is missing
	@$(VENV) -m megatron_avatar.doctor

lint: $(TESTED) ## static checks
	@$(VENV) -m ruff check .
	@$(VENV) -m mypy

clean: ## remove .venv and caches, keep runs/
	rm -rf .venv .pytest_cache .hypothesis .ruff_cache .mypy_cache $(COVERAGE)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip comes from ensurepip, or, where Debian's python3-venv is missing, from a pip outside of the environment.
$(INSTALLED): requirements.txt
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' 2>/dev/null || { echo 'error: Python 3.11 or newer was not found.' \
	  'Install it (Debian 12, Ubuntu 24.04: apt install python3), or name it: make PYTHON=FILE' >&2; exit 1; }
	@if ! $(VENV) -m pip --version >/dev/null 2>&1; then \
	  echo 'making .venv'; \
	  if "$(PYTHON)" -c 'import ensurepip' 2>/dev/null; then "$(PYTHON)" -m venv --clear .venv; \
	  elif "$(PYTHON)" -m pip --version >/dev/null 2>&1; then \
	    "$(PYTHON)" -m venv --clear --without-pip .venv; \
	    "$(PYTHON)" -m pip --python $(VENV) --quiet install pip; \
	  else echo 'error: this Python has neither venv nor pip.' \
	    'Install one (Debian, Ubuntu: apt install python3-venv), or name another: make PYTHON=FILE' >&2; exit 1; fi; \
	fi
	@echo 'installing requirements.txt into .venv (some minutes, once)'
	@$(PIP) -r requirements.txt
	@touch $@

$(TESTED): requirements-test.txt $(INSTALLED)
	@echo 'installing requirements-test.txt into .venv (once)'
	@$(PIP) -r requirements.txt -r requirements-test.txt
	@touch $@
