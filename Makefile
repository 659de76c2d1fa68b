VENV   ?= .venv
PORT   ?= 7860
DATA   ?= data/train
RUN    ?= runs/tiny
PYTEST ?=
WORKERS ?= 2
# The first of these that is 3.11 or newer makes the environment.
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3

PY       := $(VENV)/bin/python
SETTINGS := settings.ini pyproject.toml setup.py
# A third of a CPU training step went to the kernel's memory calls; with these it is none.
MALLOC   := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help app test train bench notebooks docs

help:  ## this list
	@sed -n 's/^\([a-z.]*\):.*## /\1\t/p' Makefile | expand -t 18
	@echo "Variables: PYTHON VENV PORT DATA RUN PYTEST WORKERS, as in: make app PORT=8000"

app: $(VENV)/.installed-app  ## the app on http://127.0.0.1:7860 (PORT)
	GRADIO_SERVER_NAME=127.0.0.1 GRADIO_SERVER_PORT=$(PORT) $(PY) app.py

test: $(VENV)/.installed-dev  ## ruff and mypy, then pytest in WORKERS processes (PYTEST="-k repo" adds arguments)
	$(PY) -m ruff check
	$(PY) -m mypy
	$(PY) -m pytest -n $(WORKERS) $(PYTEST)

train: $(VENV)/.installed-train  ## the tiny model from DATA into RUN; goes on where it stopped
	$(MALLOC) $(VENV)/bin/vitomr train --preset tiny --data $(DATA) --out $(RUN)

bench: $(VENV)/.installed-dev  ## the scripts in benchmarks/ that need no data of yours
	@set -e; for f in $$(grep -L 'required=True' benchmarks/*.py); do echo "== $$f"; $(PY) $$f; done

notebooks: $(VENV)/.installed-dev  ## notebooks to vitomr/, then cleaned
	$(VENV)/bin/nbdev_export
	$(VENV)/bin/nbdev_clean

docs: $(VENV)/.installed-docs  ## the documentation into _docs/
	$(PY) -m mkdocs build --strict

requirements.txt: settings.ini  ## the Space's copy: what reading and the app need
	@{ echo '# From settings.ini: make requirements.txt'; sed -n 's/^requirements *= *//p; s/^app_requirements *= *//p' settings.ini | tr -s ' ' '\n'; } > $@

# A stamp is written when all before it went well, so a broken install starts over.
$(VENV)/.installed-app $(VENV)/.installed-train $(VENV)/.installed-docs: $(VENV)/.installed-%: $(SETTINGS)
	@$(venv)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install -e '.[$*]'
	@touch $@

$(VENV)/.installed-dev: $(SETTINGS)
	@$(venv)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install -e '.[dev]'
	@touch $(VENV)/.installed-app $(VENV)/.installed-train $@

# Keep an environment with a working pip; else make one, or mend one that was left half made.
define venv
$(PY) -m pip --version >/dev/null 2>&1 && exit 0; \
for p in $(PYTHON); do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; p=; \
done; \
[ -n "$$p" ] || { echo 'No Python 3.11 or newer among: $(PYTHON). Install one, or name it: make PYTHON=/path/to/python3.11' >&2; exit 1; }; \
$$p -c 'import ensurepip, venv' 2>/dev/null || { \
  echo "$$p cannot make environments. On Debian or Ubuntu: apt-get install $$($$p -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; }; \
clear=; $(PY) -c '' 2>/dev/null || clear=--clear; \
echo "Making $(VENV) with $$p"; $$p -m venv $$clear $(VENV)
endef
