# One line a target: `make help`. Everything happens inside .venv; nothing else on the machine is touched.

PYTHON ?= python3
PORT   ?= 8888
# Where to take torch from first, where the default build is not the one wanted. On Linux without a GPU,
# TORCH_INDEX=https://download.pytorch.org/whl/cpu saves a download of some gigabytes. What torch itself needs
# comes from the usual place.
TORCH_INDEX ?=
# Stages for `make test`, all when empty: ruff format mypy tests notebooks; or cases for `make bench`, such as "ema s4d"
ONLY ?=
# Further options for `make train`, such as --task listops, or for `make bench`, such as --threads 2
ARGS ?=
# Any word makes `make bench` compare with other packages too; they are installed into .venv/peers and used by it alone
PEERS ?=

# Threads that wait for long should sleep and leave the cores to others: see longseq_tutorial/__init__.py.
export GOMP_SPINCOUNT ?= 10000

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/installed
FIRST := $(firstword $(sort $(wildcard notebooks/00_*.ipynb)))

# A moved or copied folder carries an environment that points to its old place: install again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

.DEFAULT_GOAL := help
.PHONY: help lab test course notebooks train bench doctor clean FORCE

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=python3.12] [PORT=8888] [TORCH_INDEX=URL] [ONLY='ruff tests']"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1~\2/p' Makefile | awk -F'~' '{ printf "%-18s %s\n", $$1, $$2 }'

lab: $(STAMP) ## set up, then open JupyterLab on the course (PORT= chooses the port)
	@echo "JupyterLab starts. Open the address below, token included, if no browser does; Ctrl-C ends it."
	@$(PY) -m jupyterlab --ServerApp.root_dir="$(CURDIR)" --ServerApp.ip=127.0.0.1 --ServerApp.port=$(PORT) \
		--LabApp.default_url=/lab$(if $(FIRST),/tree/$(FIRST)) \
		--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --log-level=WARN \
		$(if $(filter command environment,$(origin PORT)),--ServerApp.port_retries=0) \
		$(if $(filter 0,$(shell id -u)),--ServerApp.allow_root=True)

test: $(STAMP) ## set up, then run the linters, the types, every test and every notebook (ONLY= picks stages)
	@$(PY) tests/run_all.py $(ONLY)

course: $(STAMP) ## run the whole course without a browser: readable HTML and a trained model
	@$(PY) notebooks/build.py course

notebooks: $(STAMP) ## build the notebooks from notebooks/source, executed (for authors)
	@$(PY) notebooks/build.py build

train: $(STAMP) ## train Mega on spoken digits in a few minutes (ARGS= passes other options)
	@$(PY) -m longseq_tutorial.train $(or $(ARGS),--task speech --model mega --recipe laptop)

bench: $(STAMP) $(if $(PEERS),$(VENV)/peers/installed) ## measure time, memory and growth (ONLY= picks cases or targets, PEERS=1 adds peers)
	@$(if $(PEERS),PYTHONPATH="$(CURDIR)/$(VENV)/peers") $(PY) -m benchmarks $(ONLY) $(ARGS)

doctor: ## say what is wrong with the environment, and how to mend it
	@if [ -x $(PY) ]; then $(PY) -m longseq_tutorial.doctor; else $(PYTHON) -m longseq_tutorial.doctor; fi

clean: ## remove the environment, caches and builds (never your notebooks, data or runs)
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/peers/installed: benchmarks/peers.txt $(STAMP)
	@echo "Installing what to compare with into $(@D)."
	@rm -rf $(@D)
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

# The two checks speak in one line each; a half-made .venv is made anew.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "No '$(PYTHON)' found. Install Python 3.11 to 3.13, or name one: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14))' || { \
		echo "$$($(PYTHON) --version 2>&1) does not fit: the course needs Python 3.11 to 3.13. Name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) cannot make environments: its venv module is missing. On Debian or Ubuntu: sudo apt install python3-venv"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the course into .venv: a few minutes the first time, seconds from then on."
	@$(if $(TORCH_INDEX),$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps --index-url $(TORCH_INDEX) torch)
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[train,test]"
	@$(PY) -m jupyter labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements >/dev/null 2>&1 || true
	@echo "$(CURDIR)" > $@
