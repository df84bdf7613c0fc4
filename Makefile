# Two commands do everything: `make demo` and `make test`. Each sets up .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# PyTorch for CPU or CUDA: see "CPU or CUDA" in the README.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
DEMO ?=

export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions

.PHONY: demo test format lint types imports proto proto-check docs docs-check site unit hosts bench clean help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed ## train a small Llama with nowcasting and write runs/demo/report.html
	$(BIN)/python -m sidecast.trainer.demo $(DEMO)

test: lint types imports proto-check docs-check site unit ## lint, types, generated code, the site and all tests

# Three files of tests at a time, on two cores too: most of what tests do is to start processes, and to wait for them.
# In their order, so that those of a second or two are the last, and no worker waits for another's minute.
unit: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

hosts: $(VENV)/.installed ## train on two hosts over pdsh, through a cut and a bad network; needs root
	$(BIN)/python -m tests.hosts

format: $(VENV)/.installed ## ruff: mend what it can, and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.installed ## ruff: style, errors and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed ## mypy
	$(BIN)/mypy -p sidecast

imports: $(VENV)/.installed ## what editors see: every import of the tree can be resolved
	$(BIN)/basedpyright

proto: $(VENV)/.installed ## regenerate protos/*_pb2*
	$(BIN)/python protos/generate.py

proto-check: $(VENV)/.installed
	$(BIN)/python protos/generate.py --check

docs: $(VENV)/.installed ## regenerate the tables of settings, metrics and decisions in docs/
	$(BIN)/python docs/generate_settings.py
	$(BIN)/python docs/generate_metrics.py
	$(BIN)/python docs/generate_decisions.py

docs-check: $(VENV)/.installed
	$(BIN)/python docs/generate_settings.py --check
	$(BIN)/python docs/generate_metrics.py --check
	$(BIN)/python docs/generate_decisions.py --check

# Its notice about a successor is for whoever chooses the tool (ADR 32).
site: $(VENV)/.installed ## the pages as a site in build/site, all links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

bench: $(VENV)/.installed ## the benchmarks' short presets, a minute each, on the CPU
	$(BIN)/python -m benchmarks.bench_graph --preset ci
	$(BIN)/python -m benchmarks.bench_families --preset ci
	$(BIN)/python -m benchmarks.bench_nino --preset small
	$(BIN)/python -m benchmarks.bench_transport --quick
	$(BIN)/python -m benchmarks.bench_stall --preset quick
	$(BIN)/python -m benchmarks.bench_farm --preset ci
	$(BIN)/python -m benchmarks.bench_real_pushes --steps 300 --seeds 2

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "sidecast needs Python 3.11 ($(PYTHON) not found; set PYTHON=...)"; exit 1; }
	@command -v g++ >/dev/null || { echo "sidecast needs g++: DeepSpeed compiles an operator on CPU (Debian: apt-get install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean: ## remove everything that was made
	rm -rf $(VENV) build .cache runs
