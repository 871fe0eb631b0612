# The main commands; each does its own set-up. Settings go through: make demo ARGS="guidance.w=1"
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
ARGS ?=

.PHONY: demo test bench lfw clean

demo: $(VENV)/installed  ## the pipeline, end to end
	@echo
	@echo "No trained weights are embedded yet. This demo samples with small RANDOM weights:"
	@echo "every stage is the real one, but its pictures are patterns, not faces."
	@echo
	$(RUN) -m models.random_weights --size small output/random-small
	$(RUN) create_sample_identity_contexts.py $(ARGS)
	$(RUN) create_negative_contexts.py $(ARGS)
	$(RUN) sample.py $(ARGS) guidance.w=0
	$(RUN) sample.py $(ARGS)
	@echo
	@echo "Done. Look at the contact sheets, with and without the negative contexts: output/demo/*/contact_sheet.png"

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
