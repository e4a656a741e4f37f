# Two commands do everything: `make app` opens the workbench, `make test` checks the project. `make help` lists the rest.
#   PYTHON=python3.12   another interpreter (3.10 to 3.13)
#   VENV=path           another virtual environment
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu   take torch from there: no CUDA libraries, 2 GB less on Linux

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help app test venv zoo lint format types fast gate slow mutants coverage-table census bench bench-kernels reference pictures train clean

help:
	@echo "make app             open the workbench on the embedded language model"
	@echo "make test            ruff, mypy, the fast tests, and the GPU kernels compiled without a GPU"
	@echo "make venv            the environment with everything that the tests need"
	@echo "make lint | format   check | rewrite the style of all files"
	@echo "make fast | slow     the fast | slow tests alone"
	@echo "make gate            compile every Triton kernel for four targets, without a GPU"
	@echo "make mutants         plant 85 wrong formulas in the kernels, one by one: the tests must catch each"
	@echo "make coverage-table  measure interception and attribution on every model of the zoo, write docs/coverage.md"
	@echo "make census          sweep every model type of transformers and diffusers (long)"
	@echo "make bench           measure everything, next to other tools"
	@echo "make bench-kernels   measure the kernels alone, next to torch's own attention"
	@echo "make reference       write docs/reference.md from the docstrings"
	@echo "make pictures        write docs/images with Chromium"
	@echo "make train           train the embedded models again (TEXT=\"files\" for the language model)"
	@echo "make clean           remove the environment and what was built"

app: $(VENV)/.app
	$(VENV)/bin/headscope app --model embedded:lm

test: lint types fast gate

venv: $(VENV)/.dev

zoo: $(VENV)/.zoo .zoo/torchvision

lint: $(VENV)/.dev
	$(RUN) -m ruff check .

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(VENV)/.dev
	$(RUN) -m mypy

fast: $(VENV)/.dev
	$(RUN) -m pytest -n 2 --dist loadfile

gate: $(VENV)/.dev
	env -u TRITON_INTERPRET $(RUN) -m headscope.kernels.triton.targets

slow: $(VENV)/.dev
	$(RUN) -m pytest -m "slow and not gpu"

mutants: $(VENV)/.dev
	$(RUN) -m tests.kernels.mutants

coverage-table: zoo
	$(RUN) -m tests.coverage
	$(RUN) -m tests.attribution_coverage

census: zoo
	$(RUN) -m tests.census

bench: zoo
	$(RUN) -m bench

bench-kernels: $(VENV)/.dev
	$(RUN) -m bench kernels

reference: $(VENV)/.dev
	$(RUN) docs/make_reference.py

pictures: $(VENV)/.dev
	$(RUN) docs/screenshots.py

train: $(VENV)/.dev
	$(INSTALL) -e ".[train,diffusion]"
	$(RUN) probe/embedded/train_vit.py && $(RUN) probe/embedded/model_card.py probe/embedded/vit
	$(RUN) probe/embedded/train_mmdit.py && $(RUN) probe/embedded/model_card.py probe/embedded/mmdit
	$(if $(TEXT),$(RUN) probe/embedded/train_lm.py --text $(TEXT) && $(RUN) probe/embedded/model_card.py probe/embedded/lm,@echo "embedded:lm is left as it is: name the texts with make train TEXT=\"first.txt second.txt\"")

clean:
	rm -rf "$(VENV)" .zoo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis ./*.egg-info

# Each stamp is touched when its installation succeeded; a second run does nothing until these files change.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] <= (3, 13) else f'Python 3.10 to 3.13 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12')"
	$(PYTHON) -m venv "$(VENV)"
	@echo "installing torch (the largest download by far; see TORCH_INDEX in README.md) …"
	$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(VENV)/.app: $(VENV)/.torch pyproject.toml
	@echo "installing headscope and its workbench …"
	$(INSTALL) -e ".[app]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "installing headscope, its workbench and its tests …"
	$(INSTALL) -e ".[dev]"
	@touch $@ "$(VENV)/.app"

# timm requires torchvision, whose CUDA build beside a CPU build of torch breaks `import transformers`: so timm comes without its
# requirements, and torchvision lies in a folder that only the tests of the zoo look into.
$(VENV)/.zoo: $(VENV)/.dev
	@echo "installing the libraries and tools of the conformance table …"
	$(INSTALL) -e ".[dev,zoo]"
	$(INSTALL) --no-deps timm
	@touch $@

.zoo/torchvision: constraints.txt $(VENV)/.torch
	$(INSTALL) --no-deps --upgrade --target .zoo torchvision==0.28.0
	@touch $@
