# The main commands; each does its own set-up. Settings go through: make demo NAME=w1 ARGS="guidance.w=1"
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
ARGS ?=
NAME ?= demo

.PHONY: demo experiment test bench lfw clean

demo: $(VENV)/installed  ## the paper's experiment in miniature, from contexts to a recogniser
	$(RUN) -m experiments.demo paths.run=$(NAME) $(ARGS)

experiment: $(VENV)/installed  ## the same at 500 identities x 20 images, with recognisers trained on each set: hours
	$(RUN) -m experiments.experiment $(ARGS)

test: $(VENV)/installed  ## every test, on the CPU
	$(RUN) -m pytest

lfw: $(VENV)/installed  ## real faces: align, verify and score LFW where the preset lfw of config/config.py points
	$(RUN) align.py --preset lfw $(ARGS)
	$(RUN) verify_fr.py --preset lfw $(ARGS)
	$(RUN) plot_distributions.py --preset lfw $(ARGS)

bench: $(VENV)/installed  ## speed of sampling on this machine, as ratios to the published algorithm
	$(RUN) -m benchmarks.sampling

clean:  ## remove the results (not the environment)
	rm -rf output

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --progress-bar off -r requirements.txt
	touch $@
