# make demo · make test · make bench · make lint      (needs python3 and make; everything else is installed in .venv)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SECONDS ?= 300
# Threads are fedge's to place; libraries that each start their own pool take the cores from one another.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test lint fuzz bench bench-round bench-training bench-memory bench-codec bench-bytes bench-uploads bench-attacks bench-aggregation bench-learning simulate-faults prove-kills test-pi clean
.DELETE_ON_ERROR:

help:
	@echo "make demo            train the digits on 20 emulated phones; results in build/demo"
	@echo "make test            run the tests"
	@echo "make lint            ruff and mypy"
	@echo "make fuzz            fuzz the decoders of messages and codec for SECONDS=300; what it finds in build/fuzz"
	@echo "make bench-round     seconds per round beside a plain PyTorch loop, and TLS and signatures beside TCP; results in build/bench/round*.json"
	@echo "make bench-training  a training step, memory, start and size beside PyTorch's; results in build/bench/training.json"
	@echo "make bench-memory    memory and time of a training step with memory budgets; results in build/bench/memory.json"
	@echo "make bench-bytes     bytes until as accurate as fp32 FedAvg, beside it and STC; hours, resumed; results in build/bench/bytes.json"
	@echo "make bench-codec     bits and distortion of updates beside other codecs'; results in build/bench/codec.json"
	@echo "make bench-uploads   memory of server and broker while 300 clients upload at once; results in build/bench/uploads.json"
	@echo "make bench-attacks   attacks on real brokers and a real server, and what refused them; results in build/bench/attacks.json"
	@echo "make bench-aggregation  speed and memory of aggregation rules; results in build/bench/aggregation.json"
	@echo "make bench-learning  what federations learn from uneven, hostile and personal data; two hours, FULL=1 many, resumed; results in build/bench/learning.json"
	@echo "make bench           every benchmark"
	@echo "make simulate-faults  whole federations under faults, an hour of them; results in build/bench/faults.json"
	@echo "make prove-kills     50 rounds in which server, clients and broker are killed; results in build/bench/kills.json"
	@echo "make test-pi          a card's image, booted in QEMU as two boards, power cut in between; results in build/bench/pi.json"
	@echo "make clean           remove build results and caches, keep $(VENV)"

demo: $(VENV)/.demo
	$(BIN)/fedge demo -o build/demo

# All of them two files at a time, as build machines have two cores; with ARGS, what those say.
test: $(VENV)/.dev
	$(BIN)/pytest $(or $(ARGS),-n 2 --no-loadscope-reorder)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In an environment of its own: atheris is no part of the developer's extra, as it lacks wheels for most platforms.
fuzz: build/fuzz/venv/.done
	PYTHONPATH=. build/fuzz/venv/bin/python tests/edge_client/codec/fuzz.py -max_total_time=$(SECONDS) $(ARGS)

bench-round: $(VENV)/.dev
	$(BIN)/python tests/bench/round.py $(ARGS)
	$(BIN)/python tests/bench/round.py --tls $(ARGS)

# PEERS=1 measures ExecuTorch and onnxruntime-training too, each in an environment of its own.
bench-training: $(VENV)/.dev
	$(BIN)/python tests/bench/training.py $(ARGS)

bench-memory: $(VENV)/.dev
	$(BIN)/python tests/bench/memory.py $(ARGS)

bench-bytes: $(VENV)/.dev
	$(BIN)/python tests/bench/bytes.py $(ARGS)

bench-uploads: $(VENV)/.dev
	$(BIN)/python tests/bench/uploads.py $(ARGS)

# ARGS=--quick for those that take seconds.
bench-attacks: $(VENV)/.dev
	$(BIN)/python tests/bench/attacks.py $(ARGS)

bench-aggregation: $(VENV)/.dev
	$(BIN)/python tests/bench/aggregation.py $(ARGS)

# ARGS='mcmahan hostile' for some of its parts.
bench-learning: $(VENV)/.dev
	$(BIN)/python -m tests.bench.learning $(ARGS)

# NNCodec is built from its source distribution, in an environment of its own.
bench-codec: $(VENV)/.dev
	$(BIN)/python tests/bench/codec.py $(ARGS)

bench: bench-round bench-training bench-memory bench-codec bench-bytes bench-uploads bench-attacks bench-aggregation bench-learning
	for run in fashion-mnist mnist-writers shakespeare; do $(BIN)/python tests/bench/real.py $$run || exit 1; done

# ARGS='--seconds 60' for a taste; ARGS='--first SEED --trace' shows what happens in one run.
simulate-faults: $(VENV)/.dev
	$(BIN)/python -m tests.faults $(ARGS)

# ARGS='--seed SEED' for the same kills again; ARGS='--keep FOLDER' leaves ledger, journals and logs there.
prove-kills: $(VENV)/.dev
	$(BIN)/python -m tests.kills $(ARGS)

# Takes the Debian packages that .ci/run names, and half an hour. ARGS=--quick for minutes; ARGS=--suite for the device's
# tests on aarch64; ARGS='--keep FOLDER' leaves cards and consoles there.
test-pi: $(VENV)/.dev
	$(BIN)/python -m tests.pi $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find edge_client broker_server export deploy tests -name __pycache__ -prune -exec rm -rf {} +

# A stamp stands for an installation; what it was made from is what it depends on.
$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo]'
	touch $@

# The developer's extra holds the demo's.
$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

build/fuzz/venv/.done: pyproject.toml
	$(PYTHON) -m venv build/fuzz/venv
	build/fuzz/venv/bin/python -m pip install -q atheris hypothesis msgspec numpy pcodec pytest
	touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "fedge needs Python 3.11 or later; no '$(PYTHON)' here: make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"fedge needs Python 3.11 or later, this is {sys.version.split()[0]}: make PYTHON=/path/to/a/newer/python")'
	@$(PYTHON) -c 'import sys; sys.exit(sys.maxsize < 2**32 and "fedge needs a 64-bit Python: ONNX Runtime has no 32-bit wheels")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "venv is missing: on Debian, apt-get install python3-venv" >&2; exit 2; }
