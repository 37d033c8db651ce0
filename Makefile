# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export FLWR_TELEMETRY_ENABLED := 0

.PHONY: demo test check wheel-test compose-test network network-table faults slow clean

demo: $(VENV)/installed
	$(BIN)/fedkit run --strategy ktpfl --clients 4 --rounds 10

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Processes killed, stopped, cut off and starved at random instants: half an hour (docs/reliability.md).
faults: $(VENV)/installed-dev
	$(BIN)/python -m tests.faults.trials --trials 50 --seed 1

# Every strategy in processes of its own, learning over many rounds, training clients on crowded cores: half an hour.
slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

# A wheel as users get it: built, installed elsewhere, two rounds outside the repository.
wheel-test: $(VENV)/installed-dev
	$(BIN)/python tests/wheel.py

# The composition in Docker: built, killed in mid-run, scaled. Skips where no engine answers.
compose-test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m compose -rs tests/test_compose.py

# Federations on bad networks: delay, loss, low rate, cuts. Linux, as root; five minutes.
network: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m network tests/network

# The table of docs/reliability.md.
network-table: $(VENV)/installed-dev
	PYTHONPATH=tests $(BIN)/python -m network.measure

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build
