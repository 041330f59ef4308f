# Each target sets up what it needs: the first one makes $(VENV), once (about 3 minutes and 7 GB).
VENV ?= .venv
SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done)
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.installed

demo test test-all faults soak figures outputs listen: export HF_HUB_OFFLINE := 1

# Runs every folder of tests (all tests, or those that $(1) selects) and every notebook, as many at once as there are
# cores, four at most, which share the cores. What each prints is shown when it ends.
define in_parts
	@parts=$$($(BIN)/python -c 'import os; print(min(4, os.cpu_count()))'); \
	export OMP_NUM_THREADS=$$($(BIN)/python -c 'import os, sys; print(os.cpu_count() // int(sys.argv[1]))' $$parts); \
	export PYTEST_ADDOPTS="$(1)"; \
	ls -dr tests/[a-z]*/ notebooks/0*.ipynb | xargs -n 1 -P $$parts sh -c \
		'printed=$$($(BIN)/pytest --nbval-lax --nbval-current-env $$0 2>&1); status=$$?; \
		printf "%s\n" "$$printed"; [ $$status = 0 ] || echo "FAILED: $$0"; exit $$status'
endef

.PHONY: help demo test test-all faults soak lab figures outputs bench gpu weights badges listen tables docs clean python
.DEFAULT_GOAL := help

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s%s\n", $$1, $$2 }' Makefile

demo: $(READY) ## Sounds for four captions and their spectrograms, then the notebooks, into runs/
	$(BIN)/refined-ldm generate --out runs/demo --seed 0 --picture \
		"a dog barks twice" "a clock ticks slowly" "a dog barks, then a bell rings" "thunder rolls while a bird chirps"
	$(BIN)/refined-ldm notebooks

test: $(READY) ## The tests and the notebooks, several folders at once
	$(call in_parts,-m 'not slow')

test-all: $(READY) ## The same with the slow tests
	$(call in_parts,)

faults: $(READY) ## Try to lose training runs: 50 kills, full disks and more; prints how many survived (minutes)
	$(BIN)/python -m tests.support.faults

soak: $(READY) ## Generate, train and resume with faults for MINUTES=60, and print the slope of the memory
	$(BIN)/python -m tests.support.faults --soak $(or $(MINUTES),60)

lab: $(READY) ## Open the notebooks in JupyterLab, on this machine alone
	$(BIN)/jupyter lab --ip 127.0.0.1 notebooks

figures: $(READY) ## Run the notebooks and write what they draw to figures/
	$(BIN)/refined-ldm notebooks -p write_figures true

bench: $(READY) ## Measure speed and memory
	$(BIN)/python -m tests.benchmark

gpu: $(READY) ## Measure what this machine's GPU does with the project, in 8 minutes, into runs/gpu
	$(BIN)/python -m tests.benchmark.gpu

outputs: $(READY) ## Run the notebooks and keep in them what reads well on the web
	$(BIN)/python notebooks/store_outputs.py

weights: $(READY) ## Train the shipped weights again and measure them (hours; goes on where it was stopped)
	$(BIN)/refined-ldm train --preset tiny --run runs/tiny --resume
	$(BIN)/refined-ldm train --conditioner tiny-roberta --stage clap --lr 5e-4 --run runs/tiny-roberta --resume
	$(BIN)/python -m refined_ldm.cli.ship_weights runs/tiny

badges: $(READY) ## Add Colab badges for REPO=owner/name to the README and the notebooks
	$(BIN)/python notebooks/badges.py $(REPO)

listen: $(READY) ## Make the sounds, spectrograms and the animation of the documents with the shipped weights
	$(BIN)/python docs/listen.py
	$(BIN)/python docs/tables.py

tables: $(READY) ## Write the tables of the documents from the stored measurements
	$(BIN)/python docs/tables.py

docs: $(READY) ## Build the documents, the API reference and the notebooks as a site in build/site
	@$(BIN)/python -c "import mkdocs_jupyter, mkdocstrings" 2>/dev/null || $(PIP) -e '.[docs]'
	rm -rf build/pages && mkdir -p build/pages
	cp -R README.md CHANGELOG.md CONTRIBUTING.md LICENSE CITATION.cff docs notebooks figures build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs.yml
	@echo "build/site/index.html"


clean: ## Remove the environment and all runs
	rm -rf $(VENV) runs build

python: # which one would be used; .ci/run asks
	@echo $(PYTHON)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(SUPPORTED)' || \
		{ echo "Python 3.11 or 3.12 was not found; name yours: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch torchvision -e '.[notebooks,laion,test]'
	$(PIP) --no-deps aisfx torchcrepe audioldm audioldm_eval msclap  # they declare versions of 2022 that what we use of them does not need
	$(PIP) --no-deps brotli fastapi gradio gradio_client groovy hf-gradio orjson pydub python-multipart pytz safehttpx \
		semantic-version starlette tomlkit uvicorn  # gradio declares Pillow below 13, which what we use of it does not need
	touch $@
