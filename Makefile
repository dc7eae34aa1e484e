# Everything happens in .venv, with the versions of constraints.txt. Another Python: make demo PYTHON=python3.12
# More arguments: make demo ARGS="--seed 1", make test ARGS="-k cli"

PYTHON ?= python3
ARGS ?=
export TAG
BIN := .venv/bin
STAMP := .venv/installed
TESTS := .venv/tests-installed
OLDEST := .venv/oldest/bin
OLDEST_STAMP := .venv/oldest/installed

.PHONY: demo test test-oldest lint dist check-tag clean

demo: $(STAMP)
	$(BIN)/hf-polyattn demo $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# the same tests with the oldest versions that pyproject.toml allows
test-oldest: $(OLDEST_STAMP)
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -n 2 $(ARGS)

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# sdist and, from it, the wheel
dist: $(TESTS)
	rm -rf dist
	$(BIN)/python -m build

# of a release: TAG is v and the version, and the changelog gives its date
check-tag:
	@$(PYTHON) -c 'import os, re, runpy, sys; \
	  version = runpy.run_path("hf_polyattn/_version.py")["__version__"]; tag = os.environ.get("TAG"); \
	  dated = re.search(r"^## %s \(\d{4}-\d\d-\d\d\)$$" % re.escape(version), open("CHANGELOG.md").read(), re.M); \
	  sys.exit("TAG=%s is not v%s, the version of hf_polyattn/_version.py" % (tag, version) if tag != "v" + version \
	  else None if dated else "CHANGELOG.md gives no date for %s: ## %s (YYYY-MM-DD)" % (version, version))'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	@echo "installing the rest, a minute or two"
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

# what the tests need besides, TRL, ONNX, lm-eval and their like included
$(TESTS): $(STAMP)
	@echo "installing what the tests need, a minute or two"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,ecosystem]"
	@touch $@

$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv/oldest
	$(OLDEST)/python -m pip install -c constraints-oldest.txt torch
	$(OLDEST)/python -m pip install -q -c constraints-oldest.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
