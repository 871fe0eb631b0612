# The main commands; each does its own set-up. Settings go through: make demo NAME=w1 ARGS="guidance.w=1"
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
ARGS ?=
NAME ?= demo
STRATEGIES := null close rand mid far
RUNS := w0 $(STRATEGIES)
comma := ,
empty :=
space := $(empty) $(empty)

.PHONY: demo experiment test bench lfw clean

demo: $(VENV)/installed  ## the paper's experiment in miniature, from contexts to a recogniser
	$(RUN) create_sample_identity_contexts.py $(ARGS)
	$(RUN) sample.py $(ARGS) guidance.w=0 paths.run=$(NAME)/w0
	for strategy in $(STRATEGIES); do \
		$(RUN) create_negative_contexts.py $(ARGS) negatives.strategy=$$strategy && \
		$(RUN) sample.py $(ARGS) negatives.strategy=$$strategy paths.run=$(NAME)/$$strategy || exit; \
	done
	for run in $(RUNS); do $(RUN) align.py $(ARGS) paths.run=$(NAME)/$$run || exit; done
	$(RUN) plot_distributions.py $(ARGS) scores.overlay=$(subst $(space),$(comma),$(addprefix $(NAME)/,$(RUNS)))
	$(RUN) train_fr.py paths.run=$(NAME)/far fr.epochs=2 fr.images_per_identity=4 $(ARGS)
	@echo
	@echo "Done. Look at output/$(NAME)/scores/recogniser/: faces.png, the same identities with and without negative contexts;"
	@echo "distributions.png and table.md, their scores beside the paper's; and at output/$(NAME)/far/fr/*/curves.png,"
	@echo "the CosFace ResNet-50 trained on the faces of Far-Neg."

experiment: $(VENV)/installed  ## the same at 500 identities x 20 images, with recognisers trained on each set: hours
	$(RUN) -m benchmarks.experiment $(ARGS)

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
