# Every target does its own set-up: `make demo`, `make test`, `make bench`. TORCH=... picks another torch, VENV=... another place.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-tests
TEST_ALL_STAMP := $(VENV)/.installed-all-tests
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)

.PHONY: demo test test-all lint bench sanitize clean

demo: $(STAMP)
	$(BIN)/fastercache demo --out out/demo

# Two processes of one thread each take half the time of one with two threads.
test: $(TEST_STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What takes longer: more random sequences of use, more random schedules, Ray, cache-dit. Its result is bench/results/test_all.md.
test-all: $(TEST_ALL_STAMP) lint
	$(BIN)/python -m bench.test_all

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

bench: $(TEST_STAMP)
	$(BIN)/python -m pytest bench/test_ops.py --benchmark-only

# Fuzzes the C++ code longer than the tests do, with another seed each time.
sanitize: $(TEST_STAMP)
	FASTERCACHE_FUZZ_SECONDS=60 FASTERCACHE_FUZZ_SEED=$$(date +%s) $(BIN)/python -m pytest tests/ops/test_sanitizers.py tests/ops/test_fuzz.py

# The package is built against the torch that is there (--no-build-isolation), and the constraint keeps pip from replacing it.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "setuptools>=77" "pybind11>=2.13" ninja
	$(BIN)/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $(VENV)/torch.txt
	$(BIN)/pip install --quiet --no-build-isolation --constraint $(VENV)/torch.txt -e ".[demo,triton]"
	touch $@

# What the tests need besides: not for the demo, as torchao has much to say whenever diffusers is imported.
$(TEST_STAMP): $(STAMP)
	$(BIN)/python -c "import importlib.metadata as m, re; print(*(r.split(';')[0] for r in m.requires('fastercache') if re.search('extra == .test.', r)), sep='\n')" > $(VENV)/test.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/torch.txt --requirement $(VENV)/test.txt
	touch $@

$(TEST_ALL_STAMP): $(TEST_STAMP)
	$(BIN)/python -c "import importlib.metadata as m, re; print(*(r.split(';')[0] for r in m.requires('fastercache') if re.search('extra == .(ray|bench).', r)), sep='\n')" > $(VENV)/test-all.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/torch.txt --requirement $(VENV)/test-all.txt
	touch $@

clean:
	rm -rf $(VENV) build out .pytest_cache .mypy_cache .ruff_cache .benchmarks *.egg-info fastercache/*.so
