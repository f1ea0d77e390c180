# Two commands matter: `make bench` and `make test`. Both set up everything they need in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Test processes share the cores; more threads each would only fight. One more than there are cores, as some tests wait.
# A file is run by one process: its tests share what takes long to make.
JOBS ?= 3

.PHONY: bench test gpu mutants cluster cluster-stop package lint docs release hub-kernel format clean help

help:
	@echo "make bench    train, evaluate and measure EfficientVMamba-T on three tasks; print one table"
	@echo "make test     run the tests"
	@echo "make gpu      on a machine with a GPU: check and measure everything there in half an hour, installing nothing"
	@echo "make mutants  break the Triton kernels on purpose; the tests have to notice"
	@echo "make lint     ruff (format and check) and mypy"
	@echo "make docs     build the documentation into site/, failing on broken links"
	@echo "make release  build wheel and sdist and try them in an environment of their own"
	@echo "make hub-kernel  write the scans as a kernel repository of the Hugging Face hub into hub-kernel/"
	@echo "make format   let ruff rewrite the files"
	@echo "make cluster  bring up a SLURM cluster of two nodes on this machine; make cluster-stop ends it"
	@echo "make clean    remove the environment and build leftovers"

bench: $(READY)
	$(BIN)/evmamba bench $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

cluster:
	@$(PYTHON) tests/launch/cluster/slurm_cluster.py start

cluster-stop:
	@$(PYTHON) tests/launch/cluster/slurm_cluster.py stop

# Half an hour on a GPU: needs torch and triton, installs nothing. A folder that has rows already is gone on with.
OUTPUT ?= gpu-day
gpu:
	$(PYTHON) launch/measure/gpu_day.py --output $(OUTPUT) $(ARGS)

# Break the Triton kernels on purpose and see that the tests notice.
mutants: $(READY)
	$(BIN)/python tests/mutants.py $(ARGS)

# mypy and the documentation have to see the floors where they are installed: below one name.
PACKAGE := .package
package: $(READY)
	@rm -rf $(PACKAGE) && mkdir -p $(PACKAGE)/evmamba && ln -s $(CURDIR)/evmamba/* $(PACKAGE)/evmamba/
	@for floor in conf kernels launch tasks; do ln -s $(CURDIR)/$$floor $(PACKAGE)/evmamba/$$floor; done

lint: package
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=$(PACKAGE) $(BIN)/mypy --cache-dir .mypy_cache -p evmamba

docs: package
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

# What is checked before a version goes out; CONTRIBUTING.md has the whole list.
release: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd dist && venv/bin/python -c 'import evmamba, torch; print(evmamba.create_model("efficientvmamba_t").eval()(torch.zeros(1, 3, 64, 64)).shape)'
	rm -rf dist/venv
	@ls -l dist

hub-kernel: $(READY)
	rm -rf hub-kernel
	$(BIN)/python -m evmamba.launch.use.hub_kernel hub-kernel

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
	rm -rf $(VENV) $(PACKAGE) site .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
