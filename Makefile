# Two commands: `make demo` trains and chats, `make test` checks everything. Both make .venv when it is missing.
PYTHON ?= python3
VENV   ?= .venv
# The versions to install: those that are tested, or with constraints-floor.txt the lowest that settings.ini allows.
CONSTRAINTS ?= constraints.txt
# More words for pip. Without a GPU, PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" spares gigabytes of CUDA.
PIP_FLAGS ?=

BIN   := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
FILES := $(shell sed -n 's/^demo_files *= *//p' settings.ini)
CUDA  := $(shell command -v nvidia-smi 2>/dev/null)
ENV    = PATH="$(BIN):$$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(if $(CUDA),,DS_ACCELERATOR=cpu)
PYTEST = $(ENV) OMP_NUM_THREADS=1 $(BIN)/python -m pytest
NBTEST = $(ENV) PYTHONPATH=$(CURDIR)/tests/no_network OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n-workers 2

.PHONY: help demo test lint format floor test-all torture audit bench export notebooks readme lab
.DEFAULT_GOAL := help

help:            ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' Makefile | expand -t 20

demo: $(STAMP)   ## real weights, real pictures: two stages of training, an evaluation and a chat, in runs/demo
	$(ENV) $(BIN)/python -m llava_nb.demo

test: lint       ## lint, the sync test, every notebook, every fast test
	$(PYTEST) tests/test_sync.py
	$(NBTEST)
	$(PYTEST) tests --ignore tests/test_sync.py -n 2 --dist loadfile -m "not slow"

lint: $(STAMP)   ## format and names of notebooks, tests, bench and tools (ruff)
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet

format: $(STAMP) ## bring them into that format
	$(BIN)/ruff format --quiet

floor:           ## make test on the lowest versions that settings.ini allows, in an environment of its own
	$(MAKE) --no-print-directory test VENV=$(VENV)-floor CONSTRAINTS=constraints-floor.txt

test-all: lint     ## the same and what is slow: cells flagged so, and runs with several ranks
	$(PYTEST) tests/test_sync.py
	$(NBTEST) --flags slow --cell-timeout 2400
	$(PYTEST) tests --ignore tests/test_sync.py -n 2 --dist loadfile --deselect tests/test_soak.py
	$(PYTEST) tests/test_soak.py

torture: $(STAMP) ## what a run survives, many times over: 50 kills at random instants, one at every named point, fuzzing, every spoilt model folder, a long run
	KILLS=50 SIGNALS=20 FAILPOINTS=all MUTATIONS=all FUZZ=200000 FUZZ_PICTURES=20000 SOAK=10000 $(PYTEST) tests/test_catalogue.py tests/test_reliability.py tests/test_storage.py tests/test_fuzz.py tests/test_mutations.py tests/test_soak.py

audit: $(STAMP)  ## known holes in what is installed (pip-audit), doubtful calls in our own code (bandit)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[audit]'
	$(BIN)/python tools/audit.py

bench: $(STAMP)  ## time what is timed, one script after another
	@for script in data gpu loss plan seal startup step; do $(ENV) $(BIN)/python bench/$$script.py || exit 1; done

export: $(STAMP) ## nbs/ to llava_nb/
	$(BIN)/nbdev_export

notebooks: export ## run every notebook and keep its outputs, then the README
	$(NBTEST) --save
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py

readme: $(STAMP) ## README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

lab: $(STAMP)    ## the notebooks in JupyterLab
	$(ENV) $(BIN)/jupyter lab --notebook-dir . nbs/index.ipynb

# One install for all targets, done again only when one of these files changes.
$(STAMP): settings.ini $(CONSTRAINTS) setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "llava_nb needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -1). Try: make PYTHON=python3.12" >&2; exit 2; }
	@echo "Installing into $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[dev,demo]'
	$(BIN)/python -m pip install $(PIP_FLAGS) -c $(CONSTRAINTS) --no-deps $(FILES)
	@touch $(STAMP)
