# make demo [MODE=planned|unplanned]   the whole path, once, with a line of JSON at its end
# make test                            every test, those with virtual machines included
# make lint, make bench, make clean
#
# As root on Debian 12. Everything that is needed is installed on the way.

MODE ?= planned
PYTHON_HOST := /usr/bin/python3
PYTHON := .venv/bin/python
PATHS := journal cdp standby deploy tests

.PHONY: packages venv bpf wheelhouse lint test demo bench clean

packages:
	@deploy/install-packages

# Debian's own interpreter: what is built with it must run inside the PE and on the source, which are Debian 12 too.
.venv/installed: pyproject.toml | packages
	@test -x $(PYTHON) || $(PYTHON_HOST) -m venv .venv
	@$(PYTHON) -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(PYTHON) -m pip install -q --disable-pip-version-check --editable '.[server]' --group dev
	@touch $@

venv: packages .venv/installed

bpf: packages
	@deploy/build-bpf

wheelhouse: venv
	@$(PYTHON) -c 'from deploy.lab.wheels import wheelhouse; wheelhouse(print)'

lint: venv
	@$(PYTHON) -m ruff check $(PATHS)
	@$(PYTHON) -m ruff format --check $(PATHS)
	@$(PYTHON) -m mypy

test: lint bpf
	@deploy/run-tests

demo: venv bpf
	@$(PYTHON) -m deploy.lab.demo --mode $(MODE)

bench: venv bpf
	@$(PYTHON) -m tests.bench

clean:
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@rm -f cdp/agent/capture/bpf/*.bpf.o
