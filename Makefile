# Everything runs in .venv, which the first target that needs it makes.
VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that is new enough.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PYTORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-fast fault check config-docs format install clean

demo: $(INSTALLED)  ## the whole way on this machine: corpus, labels, two students, comparison
	$(BIN)/tutelage demo

test: $(INSTALLED)  ## every test, the fast ones first
	$(BIN)/python -m pytest tests/unit tests/property tests/integration

test-fast: $(INSTALLED)  ## no engine, no cluster
	$(BIN)/python -m pytest tests/unit tests/property

fault: $(INSTALLED)  ## kills and damage, at seeded moments
	$(BIN)/python -m pytest -s tests/fault

check: $(INSTALLED)  ## lint, format, types, import contracts, generated documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m cluster.config_docs --check
	$(BIN)/python -m benchmarks.render --check

config-docs: $(INSTALLED)  ## docs/config.md and docs/schemas, from the field descriptions
	$(BIN)/python -m cluster.config_docs

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

# The CPU set. torch comes first, as its CPU build, from the default index where that has one and else
# from PyTorch's own. The engine's CPU build then drags in torchvision, torchaudio and torchcodec builds
# that do not match this torch and break `import transformers`; text models need none of them.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; install one or run make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0+cpu || \
		$(BIN)/pip install --quiet --index-url $(PYTORCH_CPU_INDEX) torch==2.13.0+cpu
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,hf,dev]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
