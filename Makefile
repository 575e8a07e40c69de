# The commands a developer needs; each creates .venv first where it is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

MODEL ?= olmoe
TARGET ?= ort
PRESET ?= tiny
OUT ?= out/$(notdir $(MODEL))-$(TARGET)

.PHONY: setup export plugins cpu cpu-test test test-slow gpu gpu-rehearse gpu-kernels gpu-bundle test-gpu triton-test lint format
.PHONY: clean fuzz proof weights peers

setup: $(VENV)/.installed

# An environment made while the distribution was called `ingot` would keep this folder on its path.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip uninstall --disable-pip-version-check -qq --yes ingot
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[cpu,dev,kernels,report,trt-rtx]'
	touch $@

# A family's name gets a seeded checkpoint of PRESET's shape; a folder or hub name is used as it is.
export: setup
	$(BIN)/python -m export --model $(MODEL) --target $(TARGET) --out $(OUT) --overwrite --preview \
		$(if $(wildcard graphs/$(MODEL).py),--preset $(PRESET))

# Compiles the GPU kernels, and the TensorRT plugins where TensorRT's headers are.
plugins: setup
	$(BIN)/python -m ingot.plugins.kernels.build
	$(BIN)/python -m ingot.plugins.tensorrt.build

# The kernels for CPUs, libingot_cpu.so and libingot_ort.so; what is compiled already is kept in build/cpu.
cpu: setup
	$(BIN)/python -m ingot.plugins.cpu.build

# Every kernel for CPUs on every instruction set that this processor has, under the sanitizers, and on an
# emulated ARM. -O1 and calls in place of checks inline: compiling would take a quarter of an hour.
CPU_CHECK = $(BIN)/python -m ingot.plugins.cpu.build --check --flag=-O1

cpu-test: setup
	plugins/cpu/need.sh qemu-aarch64-static:qemu-user-static aarch64-linux-gnu-g++:g++-aarch64-linux-gnu
	$(CPU_CHECK) --out build/cpu-address --flag=-fsanitize=address --flag=--param=asan-instrumentation-with-call-threshold=0
	build/cpu-address/ingot_cpu_check
	$(CPU_CHECK) --out build/cpu-undefined --flag=-fsanitize=undefined --flag=-fno-sanitize-recover=all
	build/cpu-undefined/ingot_cpu_check
	$(CPU_CHECK) --out build/cpu-thread --flag=-fsanitize=thread
	build/cpu-thread/ingot_cpu_check
	$(CPU_CHECK) --out build/cpu-arm64 --compiler aarch64-linux-gnu-g++ --flag=-static
	qemu-aarch64-static build/cpu-arm64/ingot_cpu_check

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu and not triton"

test-slow: setup
	$(BIN)/python -m pytest -m slow

# So many damaged and hostile checkpoints and ingots; tests/fuzz says what is to come of each.
FUZZ_N ?= 20000
FUZZ_SEED ?= 0

fuzz: setup
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz.checkpoint --n $(FUZZ_N) --seed $(FUZZ_SEED)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz.ingot --n $(FUZZ_N) --seed $(FUZZ_SEED)

# Plants every fault of tests/proof in a kept ingot and validates it, and exports what is unusual and right:
# a share of them by PROOF_SEED, or those whose title holds PROOF_ONLY. build/proof.json has what came of each.
PROOF_SHARE ?= 1
PROOF_SEED ?= 0
PROOF_ONLY ?=

proof: setup
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m proof --share $(PROOF_SHARE) --seed $(PROOF_SEED) \
		--only "$(PROOF_ONLY)"

# What weights in fewer bits cost, beside llama.cpp's formats of the same checkpoints. Fetches and builds
# llama.cpp, and fetches SmolLM2; everything that is made stays in build/weights.
WEIGHTS_OUT ?= benchmarks/results/weights.json

weights: setup
	$(BIN)/python benchmarks/weights.py --out $(WEIGHTS_OUT) $(WEIGHTS_ARGS)

# Ingot beside other programs on the same checkpoints, into docs/performance.md; on a quiet machine, 1 to 2 hours.
# Installs each program in an environment of its own; everything that is made stays in build/peers.
peers: setup
	$(BIN)/python benchmarks/peers.py $(PEERS_ARGS)

# Everything a GPU is to prove and measure. On the GPU machine itself, with its own python3 and PyTorch:
# no .venv, no network; `make gpu-bundle` elsewhere makes what to bring. GPU_ARGS="--only models" and such.
GPU_PYTHON ?= python3
GPU_OUT ?= build/on_gpu/results

gpu:
	PYTHONUNBUFFERED=1 $(GPU_PYTHON) benchmarks/gpu.py --out $(GPU_OUT) $(GPU_ARGS)

# The same at tiny sizes without a GPU: every phase is entered, over Triton's interpreter.
gpu-rehearse: setup
	$(BIN)/python benchmarks/gpu.py --rehearse

# The kernels for one card, those that tuning compares with them, and the same made by the other of
# Triton's two ptxas, which tells a fault of the compiler from one of ours.
SM ?= 90
BUILD_KERNELS = $(BIN)/python -m ingot.plugins.kernels.build --sm $(SM)
OTHER_PTXAS = $(if $(filter 100 120,$(SM)),older,newer)

gpu-kernels: setup
	$(BUILD_KERNELS)
	$(BUILD_KERNELS) --tune
	$(BUILD_KERNELS) --ptxas $(OTHER_PTXAS) --out plugins/lib/other-ptxas/libingot_kernels.so

# What `make gpu` needs, in one file to unpack on the GPU machine.
gpu-bundle: gpu-kernels
	git ls-files Makefile benchmarks graphs ingot plugins > build/gpu-bundle.txt
	find plugins/lib -name libingot_kernels.so >> build/gpu-bundle.txt
	tar -czf build/gpu-bundle.tar.gz -T build/gpu-bundle.txt
	@ls -l build/gpu-bundle.tar.gz | awk '{ printf "%s: %.1f MB\n", $$9, $$5 / 1e6; exit $$5 > 60 * 1048576 }'

# The tests that need a GPU, in the project's environment, after `make plugins`.
test-gpu: setup
	$(BIN)/python -m ingot.plugins.check
	$(BIN)/python -m pytest -m gpu -n 0

# Fetches Triton Inference Server into .tools and tests repositories of `ingot triton` on it.
triton-test: setup
	$(BIN)/python tests/triton_server.py
	$(BIN)/python -m pytest -m triton -n 0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf out dist build .pytest_cache .mypy_cache .ruff_cache

# The C++ library of runtime/embed. Its headers and ONNX Runtime's library are gathered in .tools/cpp.
CMAKE := cmake -S runtime/embed -DORT_ROOT=$(CURDIR)/.tools/cpp
MEMCHECK := valgrind --quiet --error-exitcode=9 --leak-check=full --show-leak-kinds=all --errors-for-leak-kinds=all \
	--suppressions=runtime/embed/tests/valgrind.supp

.PHONY: cpp cpp-headers cpp-ingots cpp-test cpp-fuzz cpp-valgrind

cpp-headers: setup
	PYTHON=$(BIN)/python runtime/embed/fetch_headers.sh .tools/cpp

# build/cpp/libingot.so and build/cpp/ingot_generate.
cpp: cpp-headers
	$(CMAKE) -B build/cpp -DCMAKE_BUILD_TYPE=RelWithDebInfo -DINGOT_TESTS=OFF
	cmake --build build/cpp --parallel 2

# The seeded tiny ingots that its tests open, made again where what exports them has changed.
cpp-ingots: build/cpp-ingots/.made

build/cpp-ingots/.made: tests/make_ingots.py tests/toy_hybrid.py $(wildcard export/*.py export/passes/*.py graphs/*.py plugins/*.py) \
		$(wildcard plugins/cpu/*.py plugins/cpu/src/* plugins/cpu/ort/*) | setup cpu
	PYTHONPATH=. $(BIN)/python tests/make_ingots.py build/cpp-ingots
	touch $@

# With AddressSanitizer and UndefinedBehaviorSanitizer, and against the Python session.
cpp-test: cpp cpp-ingots
	$(CMAKE) -B build/cpp-sanitize -DCMAKE_BUILD_TYPE=Debug -DINGOT_SANITIZE=ON \
		-DINGOT_TEST_INGOTS=$(CURDIR)/build/cpp-ingots
	cmake --build build/cpp-sanitize --parallel 2
	ctest --test-dir build/cpp-sanitize --output-on-failure
	INGOT_CPP=$(CURDIR)/build/cpp $(BIN)/python -m pytest -m cpp -n 0

# libFuzzer, under both sanitizers, on ingot.json for FUZZ_SECONDS and on graphs for a tenth of it. What it
# finds is left in build/cpp-fuzz; what it learns, in build/fuzz-corpus, which the next run begins from.
FUZZ_SECONDS ?= 600
FUZZ_SEEDS := tests/data/schema1
cpp-fuzz: cpp-headers
	PYTHON=$(BIN)/python runtime/embed/fetch_headers.sh .tools/cpp clang
	$(CMAKE) -B build/cpp-fuzz -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_C_COMPILER=clang \
		-DINGOT_FUZZ=ON -DINGOT_SANITIZE=ON -DINGOT_TESTS=OFF -DINGOT_EXAMPLES=OFF -DINGOT_WERROR=OFF
	cmake --build build/cpp-fuzz --parallel 2
	mkdir -p build/fuzz-corpus/manifest build/fuzz-corpus/graph
	for ingot in $(FUZZ_SEEDS)/*/; do name=$$(basename $$ingot); \
		cp $$ingot/ingot.json build/fuzz-corpus/manifest/$$name; cp $$ingot/model.onnx build/fuzz-corpus/graph/$$name; done
	cd build/cpp-fuzz && INGOT_FUZZ_INGOTS=$(CURDIR)/$(FUZZ_SEEDS) fuzz/fuzz_manifest -timeout=30 -max_len=65536 \
		-max_total_time=$(FUZZ_SECONDS) ../fuzz-corpus/manifest
	cd build/cpp-fuzz && fuzz/fuzz_graph -timeout=30 -max_len=65536 \
		-max_total_time=$$(($(FUZZ_SECONDS) / 10)) ../fuzz-corpus/graph

cpp-valgrind: cpp cpp-ingots
	runtime/embed/fetch_headers.sh .tools/cpp valgrind
	$(MEMCHECK) build/cpp/ingot_generate build/cpp-ingots/olmoe-ort --prompt-ids 17,300,5 --prompt-ids 4 --max-new-tokens 3
	$(MEMCHECK) build/cpp/ingot_generate build/cpp-ingots/mamba2-ort --prompt-ids 17,300,5 --max-new-tokens 3 --temperature 1
	$(MEMCHECK) build/cpp/ingot_generate_c build/cpp-ingots/granite-onnx 17 300 5
	$(MEMCHECK) build/cpp/ingot_generate_c build/cpp-ingots/olmoe-own --operators build/cpp-ingots/olmoe-own/libingot_ort.so 17 300 5
