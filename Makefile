# The commands a developer needs; each creates .venv first where it is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

MODEL ?= olmoe
TARGET ?= ort
PRESET ?= tiny
OUT ?= out/$(notdir $(MODEL))-$(TARGET)

.PHONY: setup export plugins test test-slow test-gpu lint format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[cpu,dev,kernels,report,trt-rtx]'
	touch $@

# A family's name gets a seeded checkpoint of PRESET's shape; a folder or hub name is used as it is.
export: setup
	$(BIN)/python -m export --model $(MODEL) --target $(TARGET) --out $(OUT) --overwrite --preview \
		$(if $(wildcard graphs/$(MODEL).py),--preset $(PRESET))

# Compiles the GPU kernels, and the TensorRT plugins where TensorRT's headers are.
plugins: setup
	$(BIN)/python -m plugins.kernels.build
	$(BIN)/python -m plugins.tensorrt.build

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -m slow

# On a machine with an NVIDIA GPU, after `make plugins`.
test-gpu: setup
	$(BIN)/python -m plugins.check
	$(BIN)/python -m pytest -m gpu -n 0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf out dist build .pytest_cache .mypy_cache .ruff_cache
