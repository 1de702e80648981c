# The commands people look for; CONTRIBUTING.md says more.
.PHONY: install test test-all lint types smoke docs ci

install:
	pip install -e '.[test]'

test:
	pytest

test-all:
	pytest -m "slow or not slow"

lint:
	ruff check .
	ruff format --check .

types:
	mypy

# All examples and benchmarks; of these the peers that are there: pip install -e '.[benchmark]'.
smoke:
	pytest tests/test_examples.py -m "slow or not slow"

# The site, its tutorials run; DOCS_SMALL=1 for small sizes. It wants pip install -e '.[docs]'.
docs:
	sphinx-build -W -b html docs docs/_build/html

ci:
	.ci/run
