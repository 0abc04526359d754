# Everything that one does here. It takes Python 3.11 or newer, and make; each target sets up what it needs.
#
#   make demo
#   make test ARGS="-k adam"      # ARGS is handed on: to pytest, to the server, to the exam
#   make demo PYTHON=python3.12   # any Python from 3.11 on
#   make soak SOAK_SHARE=0.05     # a twentieth of it

PYTHON ?= python3
ARGS ?=
SOAK_SHARE ?= 1
BIN := .venv/bin
DEV := .venv/.installed
BENCH := .venv/.installed-bench
SOAK := .venv/.installed-soak
GENERATE := .venv-generate/.installed
NODE := client/node/node_modules/.installed
WHERE_NPM_IS := $(if $(shell command -v npm 2>/dev/null),$(NODE))

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-large soak exam bench bench-check check fix generate node clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(DEV) ## Train nine optimizers at once on real digits; the curves go to build/demo
	@cd client/python && exec ../../$(BIN)/python -m samples.digits --output ../../build/demo $(ARGS)

serve: $(DEV) ## Run the server; make serve ARGS=--help lists its flags
	@exec $(BIN)/python -m optserve_server $(ARGS)

# Two at a time, each with servers and clients of its own; one after the other if ARGS chooses some.
test: $(DEV) $(GENERATE) $(WHERE_NPM_IS) ## Run the tests, but those that move hundreds of megabytes
	@exec $(BIN)/pytest -m "not large" $(or $(ARGS),--numprocesses 2 --dist worksteal)

test-large: $(DEV) $(WHERE_NPM_IS) ## Run the tests that move hundreds of megabytes
	@exec $(BIN)/pytest -m large $(ARGS)

soak: $(DEV) $(SOAK) $(WHERE_NPM_IS) ## Break things, many times over, and count what was lost; says how long it takes
	@cd tests && exec ../$(BIN)/python -m faults.machines --share $(SOAK_SHARE) $(ARGS)

exam: $(DEV) $(WHERE_NPM_IS) ## Examine every client against a real server
	@exec $(BIN)/python client/conformance/run.py $(ARGS)

bench: $(DEV) $(BENCH) ## Measure everything beside its peers; make bench ARGS=--help explains
	@cd tests && exec ../$(BIN)/python -m benchmarks $(ARGS)

bench-check: $(DEV) $(BENCH) ## Measure every claim about speed and memory: ok or short; under ten minutes
	@cd tests && exec ../$(BIN)/python -m benchmarks --check $(ARGS)

check: $(DEV) $(GENERATE) ## Check style, types, the contract and the architecture; seconds
	@$(BIN)/ruff check --quiet && $(BIN)/ruff format --quiet --check
	@$(BIN)/mypy protos/optserve server client/python client/conformance tests
	@exec $(BIN)/pytest --quiet tests/architecture

fix: $(DEV) ## Put the style right, as far as a machine can
	@$(BIN)/ruff check --fix && $(BIN)/ruff format

generate: $(GENERATE) ## Write the stubs, the help texts and the golden surface from the .proto files
	@.venv-generate/bin/python protos/generate.py

node: $(NODE) ## Install what the Node client needs

clean: ## Remove everything that the other targets have made
	@rm -rf .venv .venv-generate .mypy_cache .pytest_cache .ruff_cache .hypothesis client/node/node_modules
	@rm -rf build protos/build client/python/build server/build client/node/generated
	@find protos client server tests '(' -name __pycache__ -o -name '*.egg-info' ')' -prune -exec rm -rf {} +

# $(call venv,FOLDER,REQUIREMENTS,WHAT TO SAY): make a virtual environment, and note that it is complete.
define venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, and $(PYTHON) is not: make PYTHON=python3.12" >&2; exit 1; }
	@echo "$(3) ..."
	@$(PYTHON) -m venv $(1) && $(1)/bin/pip install --quiet --disable-pip-version-check -r $(2)
	@touch $@
endef

$(DEV): requirements-server.txt requirements-dev.txt protos/pyproject.toml client/python/pyproject.toml server/pyproject.toml
	$(call venv,.venv,requirements-dev.txt,Installing into .venv; the first time this takes some minutes)

$(BENCH): tests/benchmarks/requirements.txt $(DEV)
	@echo "Installing the peers to compare with into .venv ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(SOAK): tests/faults/machines/requirements.txt $(DEV)
	@echo "Installing what guides the fuzzing into .venv ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(GENERATE): protos/requirements-generate.txt
	$(call venv,.venv-generate,$<,Installing the generator of the stubs into .venv-generate)

$(NODE): client/node/package-lock.json
	@echo "Installing the Node client's packages ..."
	@cd client/node && npm ci --silent --no-audit --no-fund
	@touch $@
