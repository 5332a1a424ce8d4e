# One environment, .venv, does everything: it is built from requirements/cpu.txt by whichever target
# comes first, and built anew when that file changes. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
RECIPE ?= configs/quickstart.yaml
ARGS ?=
# Processes of pytest, which share out the files; 0 for --pdb.
JOBS ?= 2
# Where the CPU build of torch is, when the package indexes that pip is set up with lack it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
UV ?= uv

BIN := $(VENV)/bin
LOG := $(VENV)/install.log
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --max-worker-restart 0
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-deps --no-compile
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-unit lint format lock clean

# Run a command with its output in the log; when it fails, show the end of that, less pip's chatter.
quietly = { $(1); } >>$(LOG) 2>&1 || { grep -v '^WARNING: Location' $(LOG) | tail -n 20 >&2; \
	echo "make: failed; the whole log is $(LOG)" >&2; exit 1; }

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

install: $(VENV)/installed ## build the environment, 4 GB

quickstart: $(VENV)/installed ## the whole road on human ratings: data to report, on 2 CPU cores
	@$(BIN)/rayrlhf pipeline $(RECIPE) $(ARGS)

test: $(VENV)/installed ## every test; choose some with ARGS="-k packing"
	@$(PYTEST) $(ARGS)

test-unit: $(VENV)/installed ## the tests that need neither Ray nor patience
	@$(PYTEST) -m "not ray and not slow" $(ARGS)

lint: $(VENV)/installed ## ruff, mypy over the whole package, codespell
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/codespell

format: $(VENV)/installed ## let ruff rewrite what `lint` complains about
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# The time stamps of a fresh checkout say nothing, so the content of the lock decides. compileall uses
# every core, which pip does not; it may fail on a file that is meant for a newer Python.
$(VENV)/lock.txt: requirements/cpu.txt
	@if ! cmp -s $< $@; then \
		$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("make: Python %d.%d is too old: set PYTHON= to 3.11 or later" % v[:2])'; \
		echo "[1/3] new environment $(VENV) with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv --clear $(VENV); \
		echo "[2/3] installing $$(grep -c '^[a-z].*==' $<) packages from $<: 2 to 4 minutes, log in $(LOG)"; \
		torch=$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' $<); \
		setuptools=$$(sed -n 's/^\(setuptools==[^ ]*\).*/\1/p' $<); \
		$(call quietly,$(PIP) $$setuptools); \
		$(call quietly,$(PIP) $$torch || $(PIP) --index-url $(TORCH_INDEX) $$torch); \
		$(call quietly,$(PIP) --no-build-isolation --use-pep517 -r $<); \
		$(call quietly,$(BIN)/python -m compileall -q -j 0 $(VENV)/lib || true); \
	fi
	@cp $< $@

$(VENV)/installed: $(VENV)/lock.txt pyproject.toml
	@echo "[3/3] installing rayrlhf"
	@$(call quietly,$(PIP) --no-build-isolation --use-pep517 -e .)
	@touch $@

# uv keeps the pins that a lock already has unless told otherwise: ARGS="--upgrade-package ray".
# torchvision, torchaudio and torchcodec have no CPU builds; with a CPU torch they break transformers.
COMPILE = $(UV) pip compile pyproject.toml --quiet --no-header --annotation-style line \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 $(ARGS)
TORCH_CPU ?= --torch-backend cpu

lock: ## resolve requirements/*.txt again; needs uv
	@dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	printf '%s\n' torchvision torchaudio torchcodec >$$dir/cpu-excludes; touch $$dir/gpu-excludes; \
	for kind in cpu gpu; do \
		lock=requirements/$$kind.txt; options="--excludes $$dir/$$kind-excludes"; \
		if [ $$kind = cpu ]; then options="$$options $(TORCH_CPU)"; fi; \
		for part in run all; do if [ -e $$lock ]; then cp $$lock $$dir/$$part; else : >$$dir/$$part; fi; done; \
		$(COMPILE) $$options --extra $$kind --output-file $$dir/run >/dev/null; \
		$(COMPILE) $$options --extra $$kind --extra dev --constraint $$dir/run --output-file $$dir/all >/dev/null; \
		{ sed -n '/^#/p;/^[^#]/q' $$lock; \
		  echo; sed 's/  *#/  #/' $$dir/run; \
		  echo; echo "# Tools of the dev extra: make test, make lint."; \
		  awk 'NR == FNR { seen[$$1] = 1; next } !($$1 in seen)' $$dir/run $$dir/all | sed 's/  *#/  #/'; \
		} >$$dir/lock; \
		cp $$dir/lock $$lock; echo "$$lock: $$(grep -c '^[a-z].*==' $$lock) packages"; \
	done

clean: ## remove the environment and the caches of tools; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis rayrlhf.egg-info
