# The commands people look for; CONTRIBUTING.md says more.
.PHONY: install test test-all lint types smoke docs ci release-check

install:
	pip install -e '.[test]'

test:
	pytest

test-all:
	pytest -m "(slow or not slow) and not release"

lint:
	ruff check .
	ruff format --check .

types:
	mypy

# All examples and benchmarks; of these the peers that are there: pip install -e '.[benchmark]'.
smoke:
	pytest tests/test_examples.py -m "slow or not slow or release"

# The site, its tutorials run; DOCS_SMALL=1 for small sizes. It wants pip install -e '.[docs]'.
docs:
	sphinx-build -W -b html docs docs/_build/html

# What a release runs, and nobody else: every test, by a slow clock and by a fast one, the tutorials
# in full with their checks, killed runs.
release-check: lint types
	pytest -m "slow or not slow or release" --tick 1e-6
	pytest -m "(slow or not slow) and not release" --tick 1e-2
	sphinx-build -W -b html docs docs/_build/html
	python benchmarks/kill_resume.py

ci:
	.ci/run
