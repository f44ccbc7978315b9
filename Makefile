# minirlhf: `make lab` opens the course, `make test` runs what CI runs. `make help` lists the rest.
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
VENV_FLAGS  ?=
LAB_FLAGS   ?=
PYTEST_FLAGS ?=
JOBS        ?= 2
FIRST       ?= notebooks/00_start_here.ipynb
TABLE       ?= seeds

ifeq ($(OS),Windows_NT)
  BIN := $(VENV)/Scripts
else
  BIN := $(VENV)/bin
  # JupyterLab refuses to run as root (a container, mostly) unless told
  ROOT_FLAG := $(if $(filter 0,$(shell id -u)),--allow-root)
endif
PY    := $(BIN)/python
STAMP := $(VENV)/.installed

# One thread an operation: repeatable to the last bit, and no process spins for another's core.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help venv lab test lint types masters pytest slow data notebooks format table clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

venv: $(STAMP)  ## make .venv and install minirlhf with the tested versions
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -x $(PY) || $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and \
	'minirlhf needs Python 3.10 or later, this is %d.%d: name another one, for example \
	make PYTHON=python3.12 venv' % sys.version_info[:2])"
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@echo "Installing into $(VENV): about 2 GB, 1-2 minutes; pip says nothing until it is done ..."
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	@touch $(STAMP)

lab: venv  ## open JupyterLab on the first notebook (prints the address where there is no browser)
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/$(FIRST) $(ROOT_FLAG) $(LAB_FLAGS)

test: lint types masters pytest  ## run everything that CI runs

lint: venv
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
types: venv
	$(PY) -m pyright --pythonpath $(PY)
masters: venv
	$(PY) tools/build_notebooks.py --check
# one run for the tests and the notebooks, whose stored outputs are compared: one closing line;
# files are spread over JOBS processes, so that a notebook's cells stay together
pytest: venv
	$(ONE_THREAD) $(PY) -m pytest -q --durations=5 -n $(JOBS) --dist loadfile tests notebooks \
	--nbval --nbval-current-env \
	--nbval-cell-timeout=120 --nbval-sanitize-with=notebooks/sanitize.cfg $(PYTEST_FLAGS)

slow: venv  ## train PPO to its end against theory and write docs/ladder.md (about 6 minutes on two cores)
	$(ONE_THREAD) $(PY) -m pytest -q -m slow --durations=5 tests $(PYTEST_FLAGS)

data: venv  ## rebuild data/ (checkpoints, batches, MANIFEST.json) from nothing
	$(ONE_THREAD) $(PY) -m minirlhf.cli data
notebooks: venv  ## build and execute notebooks/*.ipynb from notebooks/masters/*.py
	$(ONE_THREAD) $(PY) tools/build_notebooks.py
format: venv  ## format the code and mend what ruff can mend
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .
table: venv  ## the table of the ten seeds
	$(ONE_THREAD) $(PY) -m minirlhf.cli $(TABLE)
clean:  ## remove .venv and caches (runs/ is kept)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
