PYTHON ?= $(or $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done),python3)
BIN := .venv/bin
NANO_OUT ?= runs/nano-bench
NI ?= natural-instructions
RECIPE ?= default
OUT ?= runs/sweep
BENCH_OUT ?= runs/bench
BENCH_MODEL ?= runs/dummy-7b
BENCH = $(BIN)/python -m benchmarks.suite
BENCH_FLAGS = --out $(BENCH_OUT) $(if $(ONLY),--only $(ONLY)) $(if $(wildcard $(NI)),--ni $(NI))

.DEFAULT_GOAL := help
.PHONY: help install demo sweep nano-bench bench bench-gpu bench-check test check lock clean
# The targets share .venv and the machine's few cores: `make -j` must not run two of them at once.
.NOTPARALLEL:

help: ## list the targets
	@awk -F ' *## *' '/^[a-z-]+:.* ## / {split($$1, target, ":"); printf "make %-11s %s\n", target[1], $$2}' Makefile

install: ## make .venv with the locked packages and selfguide itself (needs Python 3.11)
	@$(PYTHON) requirements/install.py

demo: install ## SELF-GUIDE with the embedded student on four tasks, on a CPU
	$(BIN)/selfguide demo

sweep: ## all tasks of NI (a clone of NI-V2) at once; SPLIT, RECIPE, MODEL and OUT choose which, how, and where
	@test -e $(NI) || { echo "selfguide data ni-v2 $(NI) fetches NI-V2 to where it is looked for; without it, try" \
	    "make sweep NI=selfguide/nano/tasks RECIPE=nano"; exit 2; }
	@$(MAKE) --no-print-directory install
	$(BIN)/selfguide sweep $(NI) --recipe $(RECIPE) --out $(OUT) $(if $(SPLIT),--split $(SPLIT)) $(if $(MODEL),--model $(MODEL))

nano-bench: install ## the embedded student against every control, 18 held-out tasks, 3 seeds: about an hour
	$(BIN)/python -m benchmarks.nano.measure --set held_out --out $(NANO_OUT)
	$(BIN)/python -m benchmarks.nano.report $(NANO_OUT)

bench: install ## all benchmarks at quick sizes, a JSON for each into BENCH_OUT; ONLY names some, SIZE=full takes hours
	$(BENCH) run --size $(or $(SIZE),quick) $(BENCH_FLAGS)

bench-gpu: ## the same with a 7B-class student of random weights and 4,000-token contexts; BIN is a GPU environment's
	test -e $(BENCH_MODEL)/config.json || $(BIN)/python -m benchmarks.dummy_model $(BENCH_MODEL)
	$(BENCH) run --size gpu --model $(BENCH_MODEL) $(BENCH_FLAGS)

bench-check: install ## name each ratio in BENCH_OUT that is out of its bounds, or fell below this hardware's baseline
	$(BENCH) check --out $(BENCH_OUT)

test: install ## run all tests
	$(BIN)/python -m pytest -q

check: install ## lint, formatting, types, import direction; and that every recipe parses
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/test_recipes.py

# uv does not read pip's configuration. It finds torch's +cpu build on the page below, or where UV_FIND_LINKS
# points instead (a folder that holds the wheel will do); UV_INDEX adds a registry of the machine's own.
lock: export UV_FIND_LINKS := $(or $(UV_FIND_LINKS),https://download.pytorch.org/whl/cpu/torch/)
lock: ## compile requirements/ anew from pyproject.toml; LOCK_FLAGS=--upgrade moves every pin
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet uv==0.13.8
	cat requirements/torch.txt requirements/lock.txt > build/lock/all.txt
	build/lock/bin/uv pip compile --quiet pyproject.toml requirements/torch.in --extra cpu --extra dev \
	    --override requirements/overrides.txt --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	    --generate-hashes --no-annotate --no-header $(LOCK_FLAGS) --output-file build/lock/all.txt
	awk -v header='# Linux x86-64, Python 3.11. Made by `make lock` from pyproject.toml; do not edit.' \
	    -v torch=requirements/torch.txt -v rest=requirements/lock.txt \
	    'BEGIN {print header > torch; print header > rest} \
	    /^[a-z]/ {out = /^torch==/ ? torch : rest} {print > out}' build/lock/all.txt

clean: ## remove caches and build outputs; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find selfguide engines cluster benchmarks tests requirements -name __pycache__ -prune -exec rm -rf {} +
