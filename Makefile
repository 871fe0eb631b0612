# The main commands; each does its own set-up. Settings go through: make demo NAME=w1 ARGS="guidance.w=1"
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --quiet --progress-bar off -c constraints.txt
ARGS ?=
NAME ?= demo

.PHONY: demo experiment test fast faults lint bench lfw clean

demo: $(VENV)/installed  ## the paper's experiment in miniature, from contexts to a recogniser
	$(RUN) -m experiments.demo paths.run=$(NAME) $(ARGS)

experiment: $(VENV)/installed  ## do negatives and variety make better recognisers? up to 20 hours; needs make lfw
	$(RUN) -m experiments.experiment $(ARGS)

test: lint  ## everything, on the CPU
	$(RUN) -m pytest -n auto --dist loadfile

fast: lint  ## what to run after each edit: under a minute
	$(RUN) -m pytest -n auto --dist loadfile -m "not slow"

faults: $(VENV)/installed-dev  ## every stage killed, starved, changed upstream, every reader attacked: the table of docs/reliability.md
	$(RUN) -m tests.faults.campaign $(ARGS)

lint: $(VENV)/installed-dev  ## ruff, and the layers check: imports go down only
	$(RUN) -m ruff check .
	$(VENV)/bin/lint-imports --no-logo

lfw: $(VENV)/installed  ## real faces: align, verify and score LFW where the preset lfw of config/config.py points
	$(RUN) align.py --preset lfw $(ARGS)
	$(RUN) verify_fr.py --preset lfw $(ARGS)
	$(RUN) plot_distributions.py --preset lfw $(ARGS)

bench: $(VENV)/installed  ## speed of sampling on this machine, as ratios to the published algorithm
	$(RUN) -m benchmarks.sampling

clean:  ## remove the results (not the environment)
	rm -rf output

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@
