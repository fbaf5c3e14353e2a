# Every target sets up what it needs: `make demo` or `make test` on a fresh machine is enough.
#
#   PYTHON     interpreter that makes the virtual environments (3.11 to 3.13)
#   RUN        interpreter that runs the jobs; `make gpu RUN=python3 SETUP=` uses an environment
#              that has the training stack already

PYTHON ?= python3
VENV := .venv
BASE_VENV := .venv-base
SETUP := $(VENV)/.installed
RUN := $(VENV)/bin/python
# A test that hangs must fail by itself: no stack of ranks may hold a CI machine for an hour.
PYTEST := $(RUN) -m pytest --timeout=900

# The newest torch that was tested, for machines without an NVIDIA GPU. A pip that is told of a CPU
# build (a local folder, an index) takes that one; otherwise pip takes the standard build, which runs
# on a CPU as well and downloads the CUDA libraries besides.
CPU_TORCH := torch==2.13.0

DEMO := demo
DEMO_JOB := --model tiny-qwen3 --gpus 2 --device cpu --seq-len 256 --global-batch-size 8
DEMO_SEARCH := $(DEMO_JOB) --strategies zero1,zero2,zero3,fsdp2,fsdp2_no_reshard \
	--sequence-parallel 1,2 --sequence-parallel-by ulysses,ring --recompute none,full \
	--micro-batches 1,2,4 --memory-limit 260MiB
# What an adapter trains is another job, so it has a study of its own, set beside the first.
DEMO_LORA := $(DEMO_JOB) --adapter lora --strategies zero2,fsdp2 --micro-batches 1,2,4 \
	--sequence-parallel 1 --confirm 1
DEMO_TRAIN := --learning-rate 3e-3 --max-steps 110 --eval-steps 55 --save-steps 80 --val-set-size 64
DEMO_RESUME_STEP := 80

.PHONY: help venv demo test test-slow conformance lint gpu bench-cli bench-overhead bench-report bench-memory bench-memory-speed bench-launch bench-search bench-search-full base-test profiles wheel clean

help:
	@echo 'make demo            a corpus, a search on 2 CPU ranks, a training run, a resumed one'
	@echo 'make test            every test that needs no GPU and ends in minutes'
	@echo 'make test-slow       the tests that take longer'
	@echo 'make conformance     exports and best.yml given to Axolotl, torchtitan and LLaMA-Factory'
	@echo 'make lint            ruff (rules and format) and mypy'
	@echo 'make gpu             tests and a measured grid on the CUDA GPU here'
	@echo 'make base-test       the wheel without extras: no torch'
	@echo 'make bench-cli       how fast the command line answers'
	@echo 'make bench-overhead  what the runner adds to a bare training loop'
	@echo 'make bench-report    how fast the report of 5,000 trials opens'
	@echo 'make bench-memory    how close the memory estimate is, and the peers; MEASURE=--measure'
	@echo '                     runs the CPU ranks again first'
	@echo 'make bench-memory-speed  how fast memory is estimated'
	@echo 'make bench-launch    how soon a trial takes its first step: cold against forked ranks'
	@echo 'make bench-search    how soon each sampler finds the best, replayed on recorded landscapes;'
	@echo '                     bench-search-full with 50 seeds instead of 10'
	@echo 'make profiles        trace the catalogue again: the profiles in autotune/memory/shipped'
	@echo 'make wheel           the wheel, in dist/'
	@echo 'make venv, clean     the environment alone; remove environments and build outputs'

venv: $(SETUP)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(VENV)/bin/pip install --quiet '$(CPU_TORCH)'
	$(VENV)/bin/pip install --quiet -e '.[train,dev]'
	touch $@

demo: $(SETUP)
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(RUN) benchmarks/build_corpus.py --out $(DEMO)/corpus.jsonl
	$(RUN) -m autotune search $(DEMO_SEARCH) --data $(DEMO)/corpus.jsonl --out $(DEMO)/study
	$(RUN) -m autotune train $(DEMO)/study/best.yml --output-dir $(DEMO)/run $(DEMO_TRAIN)
	$(RUN) -m autotune train $(DEMO)/study/best.yml --output-dir $(DEMO)/resumed $(DEMO_TRAIN) \
		--resume $(DEMO)/run/checkpoint-$(DEMO_RESUME_STEP)
	$(RUN) -m autotune search $(DEMO_LORA) --data $(DEMO)/corpus.jsonl --out $(DEMO)/lora
	$(RUN) -m autotune report $(DEMO)/study $(DEMO)/lora
	$(RUN) benchmarks/check_demo.py $(DEMO)

test: $(SETUP)
	$(PYTEST) -n 2 tests/unit tests/conformance -m 'not slow and not gpu'
	$(PYTEST) -n 2 --dist loadfile tests/integration -m 'not slow and not gpu'

test-slow: $(SETUP)
	$(PYTEST) -n 2 tests/unit tests/conformance -m 'slow and not gpu'
	$(PYTEST) -n 2 --dist loadfile tests/integration -m 'slow and not gpu'

# Each tool in an environment of its own under ~/.cache/autotune; one that cannot be installed is
# skipped with the reason.
conformance: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
conformance: export AUTOTUNE_CONFORMANCE := 1
conformance: $(SETUP)
	$(RUN) -m tests.conformance.tools.environments
	$(PYTEST) tests/conformance

lint: $(SETUP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# pytest skips every test where there is no CUDA GPU, and the grid says so: both then exit 0.
# The checkout on the path, for an environment (RUN=) that has not installed it.
gpu: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
gpu: $(SETUP)
	$(PYTEST) tests/gpu
	$(RUN) benchmarks/gpu_grid.py
	$(RUN) benchmarks/memory/gpu.py
	$(RUN) benchmarks/search/record.py cuda1

profiles: $(SETUP)
	$(RUN) benchmarks/memory/ship_profiles.py

bench-cli: $(SETUP)
	$(RUN) benchmarks/cli_speed.py

bench-overhead: $(SETUP)
	$(RUN) benchmarks/overhead.py

bench-report: $(SETUP)
	$(RUN) benchmarks/report_speed.py

# The peers' packages, which nothing else needs; without them their columns would be empty.
bench-memory: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
bench-memory: $(SETUP)
	[ -z '$(SETUP)' ] || $(RUN) -m pip install --quiet -e '.[train,dev,bench]'
	$(RUN) benchmarks/memory/report.py $(MEASURE)

bench-memory-speed: $(SETUP)
	$(RUN) benchmarks/memory/speed.py

bench-launch: $(SETUP)
	$(RUN) benchmarks/launch_start.py

bench-search bench-search-full: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
# A process a core replays: more threads in each would only wait for one another.
bench-search bench-search-full: export OMP_NUM_THREADS := 1
bench-search: $(SETUP)
	$(RUN) benchmarks/search/report.py

bench-search-full: $(SETUP)
	$(RUN) benchmarks/search/report.py --seeds 50

wheel: $(SETUP)
	rm -rf dist
	$(VENV)/bin/pip wheel --quiet --no-deps --wheel-dir dist .

# The wheel is installed anew each time: pip would take an equal version for the same package.
base-test: wheel
	$(PYTHON) -m venv --clear $(BASE_VENV)
	$(BASE_VENV)/bin/pip install --quiet dist/*.whl pytest pytest-timeout
	$(BASE_VENV)/bin/python -I benchmarks/check_base_install.py
	$(BASE_VENV)/bin/python -m pytest --timeout=300 tests/unit

clean:
	rm -rf $(VENV) $(BASE_VENV) dist build .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
