# One command each: quickstart, test, lint, doctor, system-deps. All set-up goes into .venv; nothing outside this folder is
# touched, but by `make system-deps`, which asks the system's package manager, and the run storage under ~/.local/share/outgrow.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE = 1

.PHONY: quickstart test test-cluster test-tiers test-monitoring test-parity lint doctor system-deps docs benchmarks clean
.DEFAULT_GOAL := quickstart

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14) and "outgrow needs Python 3.11 to 3.13; name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: $(READY)
	$(BIN)/outgrow quickstart

# Unit tests on two processes; those with real servers, kills and Ray one after the other, as each takes the whole machine.
test: $(READY)
	$(BIN)/python -m pytest tests/unit --numprocesses 2 --dist worksteal
	$(BIN)/python -m pytest tests --ignore tests/unit

# Long ways: a Ray head with a token and jobs submitted to it, two nodes in network namespaces of their own, the commands of the
# README, a fine-tune from base to merged export, seven engines that continue each other.
test-cluster: $(READY)
	$(BIN)/python -m pytest tests -m cluster

# What takes longer than a test should: 20 crashes in a row, a minute without the bucket, 100 histories of copies.
test-tiers: $(READY)
	$(BIN)/python -m pytest tests -m tiers

# A run watched by a real Prometheus and Alertmanager from start to end, and the report in a real browser.
test-monitoring: $(READY)
	$(BIN)/python -m pytest tests -m monitoring

# Every method on every engine, over 20 steps, against the oracle.
test-parity: $(READY)
	$(BIN)/python -m pytest tests -m parity

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m outgrow.recipes.reference
	$(BIN)/python -m outgrow.recipes.matrix_page
	$(BIN)/python -m outgrow.cluster.presets_page
	$(BIN)/python -m outgrow.monitoring.metrics_page
	$(BIN)/python -m outgrow.monitoring.alerts.build
	$(BIN)/python -m outgrow.monitoring.dashboards.build

doctor:
	@$(PYTHON) tests/doctor.py

system-deps:
	apt-get update
	apt-get install --yes --no-install-recommends g++ ninja-build libaio-dev iproute2 util-linux prometheus prometheus-alertmanager chromium

benchmarks: $(READY)
	for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
