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

# The benchmarks want their peers, too: pip install -e '.[benchmark]'.
PROGRAMS = $(filter-out benchmarks/kill_resume.py, $(wildcard examples/*.py benchmarks/[a-z]*.py))
smoke:
	for program in $(PROGRAMS); do \
		echo "$$program" && MPLBACKEND=Agg python "$$program" --smoke || exit 1; \
	done

# The site, its tutorials run; DOCS_SMALL=1 for small sizes. It wants pip install -e '.[docs]'.
docs:
	sphinx-build -W -b html docs docs/_build/html

ci:
	.ci/run
