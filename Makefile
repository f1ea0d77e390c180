# Two commands matter: `make bench` and `make test`. Both set up everything they need in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Test processes share the cores; more threads each would only fight.
JOBS ?= 2

.PHONY: bench test cluster cluster-stop lint format clean help

help:
	@echo "make bench    train, evaluate and measure EfficientVMamba-T on three tasks; print one table"
	@echo "make test     run the tests"
	@echo "make lint     ruff (format and check) and mypy"
	@echo "make format   let ruff rewrite the files"
	@echo "make cluster  bring up a SLURM cluster of two nodes on this machine; make cluster-stop ends it"
	@echo "make clean    remove the environment and build leftovers"

bench: $(READY)
	$(BIN)/evmamba bench $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

cluster:
	@$(PYTHON) tests/cluster/cluster.py start

cluster-stop:
	@$(PYTHON) tests/cluster/cluster.py stop

# mypy has to see the floors where they are installed: below one name.
lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@rm -rf .typecheck && mkdir -p .typecheck/evmamba && ln -s $(CURDIR)/evmamba/* .typecheck/evmamba/
	@for floor in conf kernels launch tasks; do ln -s $(CURDIR)/$$floor .typecheck/evmamba/$$floor; done
	MYPYPATH=.typecheck $(BIN)/mypy --cache-dir .mypy_cache -p evmamba
	@rm -rf .typecheck

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "evmamba needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .typecheck .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
