# `make demo` and `make test` work on a fresh clone: the first call makes .venv, later ones reuse it.
# `make test TORCH=2.11.0` does the same under another torch, in an environment of its own (gigabytes: its CUDA build).
PYTHON ?= python3
TORCH  ?=
VENV   := .venv$(TORCH:%=-%)
RUN    := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
TYPES  := $(VENV)/mypy.log

# Every process that the tests start would compile this package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-nightly lint notebooks bench bench-cuda bench-solvers pictures check-cuda venv clean
.DEFAULT_GOAL := test

demo: $(VENV)/.ready
	$(RUN) -m planner demo

# mypy runs beside the tests, is heard when they are over, and fails this target as they do; not under another
# torch, whose stubs are others.
test: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@$(if $(TORCH),true,$(RUN) -m mypy) >$(TYPES) 2>&1 & types=$$!; \
	echo OMP_NUM_THREADS=1 $(PYTEST); OMP_NUM_THREADS=1 $(PYTEST); tests=$$?; \
	wait $$types; types=$$?; cat $(TYPES); \
	test $$tests -eq 0 -a $$types -eq 0

# The solvers' tests with twenty times the examples (some 19,000 graphs against all their schedules), the tests
# marked nightly (a race from end to end, the methods beside the optimum, the other notebooks and the other sizes
# of other tools), and two reports: how well time limits are kept, for which no other work should run, and how
# often the optimum is found.
test-nightly: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile --hypothesis-profile nightly tests/test_solvers_*.py
	OMP_NUM_THREADS=1 $(PYTEST) -m nightly
	OMP_NUM_THREADS=1 $(RUN) -m tests.benchmarks.bench_exactness
	OMP_NUM_THREADS=1 $(RUN) -m tests.benchmarks.bench_time_limits

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Runs them from top to bottom and writes their outputs back. NAMES="05_solvers" for some of them.
notebooks: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m tests.test_notebooks $(NAMES)

bench: $(VENV)/.ready
	set -e; for name in overhead peers switch internvl2 display families; do echo "== bench_$$name"; $(RUN) -m tests.benchmarks.bench_$$name; done

# Every committed picture, drawn again.
pictures: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m tests.benchmarks.pictures

# An hour or two for all graphs; goes on where it was broken off. BENCH="--graphs unet --budgets 0.5" for a part of it.
bench-solvers: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m tests.benchmarks.bench_solvers $(BENCH)

# The interpreter as it is, with the packages it has: machines with a GPU often have no network.
check-cuda:
	$(PYTHON) -m planner check-cuda --results tests/benchmarks/results/cuda.jsonl

# The race against every peer, at most nine minutes; run again, it goes on where it stopped.
# BENCH="--part race --models unet" for a part of it, BENCH="--device cpu" for small sizes on a CPU.
bench-cuda:
	$(PYTHON) -m tests.benchmarks.bench_cuda $(BENCH)

venv: $(VENV)/.ready

# The pip that comes with Python 3.11 takes three times as long as today's to look through the index.  It would
# compile every file of every package, which takes it as long as all else; few of them are imported.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade 'pip>=25'
	sed 's/^torch==.*/$(if $(TORCH),torch==$(TORCH),&)/' constraints.txt >$(VENV)/constraints.txt
	$(RUN) -m pip install --quiet --no-compile -c $(VENV)/constraints.txt -e '.[notebooks,hf,dev]'
	$(RUN) -W ignore -c "import planner, sentence_transformers, torch._dynamo, transformers.trainer"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
