# The list of commands. `make demo`, `make train-demo` and `make test` each do everything from a bare checkout.
VENV   ?= .venv
PYTHON ?= python3
OUT    ?= demo_out
TRAIN_OUT ?= train_demo_out
# ONNX Runtime for the face encoders: cpu, or gpu on a CUDA machine. Never both.
EXTRA  ?= cpu
# Processes of the tests; a file's tests stay in one
JOBS   ?= 2
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/*.txt) CMakeLists.txt setup.py

.PHONY: demo train-demo test build lint format bench clean

demo: $(VENV)/.run
	$(BIN)/idcore demo --out $(OUT)

train-demo: $(VENV)/.train
	$(BIN)/python -m idcore.training.pulid.demo --out $(TRAIN_OUT)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# PyTorch goes first: a looser requirement would bring another build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) -e ".[$(EXTRA)]"
	touch $@

$(VENV)/.train: $(VENV)/.run
	$(PIP) -e ".[$(EXTRA),train,bench]"
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e ".[$(EXTRA),train,dev]"
	touch $@

build: $(VENV)/.dev
	$(BIN)/python -m build --outdir dist

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

bench: $(VENV)/.dev
	$(BIN)/python -m idcore.bench id_attention --backend cpu --against eager,compiled

clean:
	rm -rf build dist $(OUT) $(TRAIN_OUT) *.egg-info
