# Everything sets itself up: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: install demo test lint bench mutations clean

# What the command needs: PyTorch, Ray, Faiss for CPUs, PyAV and what they bring.
install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@echo "installing videoclip and what it needs into .venv"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[cpu,serve]'
	touch $@

# And what only tests and benchmarks need: pytest, hypothesis, ruff, mypy, mteb, and the extras.
.venv/.installed-dev: .venv/.installed
	@echo "installing what the tests need, too"
	$(PIP) -e '.[cpu,dev,mteb,serve,mcp,asr,sentence-transformers,cluster]'
	touch $@

demo: install
	$(BIN)/videoclip demo

test: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" # a core each
	$(BIN)/python -m pytest -m slow # Ray takes all cores

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed-dev # one and a half hours on two cores
	for script in $(filter-out benchmarks/mutations.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

mutations: .venv/.installed-dev # what the tests do not notice; an hour on two cores
	$(BIN)/python benchmarks/mutations.py

clean:
	rm -rf .venv build *.egg-info
