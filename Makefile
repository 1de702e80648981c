# The commands people look for; CONTRIBUTING.md says more.
.PHONY: install test test-all lint types smoke ci

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

ci:
	.ci/run
