# Every target sets up what it needs (scripts/setup.py) and runs it in .venv. `make` alone prints this list.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Two test processes with one thread each beat one process with two on two cores.
JOBS ?= 2
export PYTHONUNBUFFERED = 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-gpu up check fix bench bench-training bench-recovery apothecary gsm8k \
        cluster-demo openapi migrate tree setup setup-dev setup-bench clean check-lint check-format check-types \
        check-imports check-rooms check-sizes check-readme check-openapi

help: ## print this list
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup ## run the whole service once: attack, fine-tune, recover, gate, release; prints the table
	@$(PY) -m demo

test: setup-dev ## install what the tests need and run them (at most 12 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile -m "not long and not gpu" $(ARGS)

test-long: setup-dev ## the tests that take minutes each
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile -m "long and not gpu" $(ARGS)

test-gpu: setup-dev ## the tests that need one CUDA device
	$(PY) -m pytest -m gpu $(ARGS)

up: setup ## run the service for real use; data lives in THERIAC_HOME, Ctrl-C stops it
	@$(VENV)/bin/theriac up $(ARGS)

check: check-lint check-format check-types check-imports check-rooms check-sizes check-readme check-openapi ## every rule a machine can check
check-lint: setup-dev
	$(VENV)/bin/ruff check .
check-format: setup-dev
	$(VENV)/bin/ruff format --check .
check-types: setup-dev
	$(VENV)/bin/mypy
check-imports: setup-dev
	$(VENV)/bin/lint-imports --no-logo
check-rooms: setup-dev
	$(PY) scripts/room_linter.py app workers
check-sizes: setup-dev
	$(PY) scripts/size_budgets.py
check-readme: setup-dev
	$(PY) scripts/readme_tree.py --check
	$(PY) scripts/settings_table.py --check
check-openapi: setup-dev
	$(PY) scripts/openapi.py --check

fix: setup-dev ## apply what the linters can repair themselves, and regenerate the README's tree
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(PY) scripts/readme_tree.py
	$(PY) scripts/settings_table.py

bench: bench-training bench-recovery ## all benchmarks of docs/benchmarks.md

bench-training: setup-bench ## training tokens per second against Trainer + PEFT and TRL
	$(PY) -m bench.training $(ARGS)

bench-recovery: setup-bench ## every recovery method's dial, swept on the apothecary world
	$(PY) -m bench.recovery $(ARGS)

apothecary: setup ## rebuild the bundled base model from nothing
	$(PY) -m workers.ml.apothecary.build $(ARGS)

gsm8k: setup ## run the GSM8K rows in folder GSM8K=<folder> through the service
	@test -n "$(GSM8K)" || { echo "usage: make gsm8k GSM8K=<folder with train.jsonl>" >&2; exit 2; }
	$(PY) -m demo.gsm8k run "$(GSM8K)" $(ARGS)

cluster-demo: setup-dev ## gateway, two Celery workers, side process, PostgreSQL and Redis as real processes
	@$(PY) -m demo.cluster $(ARGS)

openapi: setup-dev ## write docs/openapi.json from the code
	$(PY) scripts/openapi.py

migrate: setup ## bring the database that THERIAC_DATABASE_URL or THERIAC_HOME names to the newest schema
	$(VENV)/bin/theriac migrate

tree: setup-dev ## write the README's tree and configuration table from the files
	$(PY) scripts/readme_tree.py
	$(PY) scripts/settings_table.py

setup:
	@$(PYTHON) scripts/setup.py --venv "$(VENV)" --extras demo

setup-dev:
	@$(PYTHON) scripts/setup.py --venv "$(VENV)" --extras dev

setup-bench:
	@$(PYTHON) scripts/setup.py --venv "$(VENV)" --extras bench

clean: ## remove the virtual environment and every cache
	rm -rf "$(VENV)" .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find app workers tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
