# make demo | test | test-original-masks | style | sprites | train-embedded | compile-check | fuzz | stress | test-gpu
#      tune | gpu | bench | bench-whole | evaluate | rederive
# make <target> PYTHON=python3   uses that interpreter as it is
#
# Without PYTHON the targets set up .venv once and reuse it until setup.py or constraints.txt change.
# With PYTHON nothing is installed, and the package runs from this folder.

.DEFAULT_GOAL := help
.PHONY: help demo test test-original-masks style sprites train-embedded compile-check fuzz stress test-gpu tune gpu bench
.PHONY: bench-whole evaluate rederive
SHELL := /bin/sh
ARGS ?=
VENV := .venv
MASKS_VENV := .venv-original-masks
SETUP_FILES := setup.py pyproject.toml constraints.txt

ifeq ($(strip $(PYTHON)),)
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
READY_TRAIN := $(VENV)/.ready-train
MASKS_PY := $(MASKS_VENV)/bin/python
READY_MASKS := $(MASKS_VENV)/.ready
# Tests in two processes, each with files of its own; an interpreter from elsewhere may lack the plugin.
TWO := -n 2 --dist loadfile
else
PY := $(PYTHON)
READY :=
READY_TRAIN :=
MASKS_PY := $(PYTHON)
READY_MASKS :=
TWO :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

# pip's resolver must see torch alone first: together with other packages it may swap the build for another.
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
# pip compiles what it installs on one core; this does on all. Some packages ship files of other Pythons: no matter.
COMPILE := $(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true

help:
	@echo "make demo             all five stages on the embedded model; pictures in outputs/demo/ (ARGS=--quick: shipped concepts)"
	@echo "make test             the tests                                                        (ARGS='-k masks')"
	@echo "make test-original-masks   Grounding DINO and SAM by their authors' packages, in an environment of 6 GB of its own"
	@echo "make style            ruff"
	@echo "make sprites          render the drawings of the embedded world again (needs npm)"
	@echo "make train-embedded   train the embedded model on, and all derived from it            (ARGS=--help)"
	@echo "make rederive         make all anew that follows from the embedded model's weights    (ARGS=--list: only tell)"
	@echo "make compile-check    compile the kernels for every GPU of the table, without one              (ARGS='--arch 90')"
	@echo "make fuzz             random cases of the operations against float64 (N=2000 INTERPRETED=200; ARGS='--replay live:7')"
	@echo "make stress           kill, fill up and damage what the cache writes; damaged concept files   (ARGS='--kills 20' FILES=2000)"
	@echo "make test-gpu         the tests that need an NVIDIA GPU"
	@echo "make tune             find the fastest configurations on this NVIDIA GPU               (ARGS='--dry 90': compile only)"
	@echo "make gpu OUT=DIR      tests, tuning, benchmarks, profile and sanitizer on a GPU, 8 min (ARGS=--dry-run: without one)"
	@echo "make bench            time context_attention against its rivals on this device        (ARGS=--quick: two minutes)"
	@echo "make bench-whole      time the whole process, and fused steps beside their rivals      (ARGS=--quick: half a minute)"
	@echo "make evaluate         does it fuse: suite, table and report in outputs/evaluate/       (ARGS=--record: into the README)"
	@echo "Add PYTHON=<interpreter> to use one that already has the dependencies; nothing is installed then."

demo: $(READY)
	@$(PY) -m weaver demo --out outputs/demo $(ARGS)

test: $(READY)
	@$(PY) -m pytest $(TWO) $(ARGS)

test-original-masks: $(READY_MASKS)
	@PYTHONPATH="$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))" $(MASKS_PY) -m pytest tests/test_masks_original.py $(ARGS)

style: $(READY)
	@$(PY) -m ruff check .

compile-check: $(READY)
	@$(PY) -m weaver_kernels.compile_check $(ARGS)

N ?= 100
INTERPRETED ?= 10
fuzz: $(READY)
	@TRITON_INTERPRET=1 PYTHONPATH="$(CURDIR)/tests:$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))" $(PY) -m operations.fuzz --live $(N) --interpreted $(INTERPRETED) $(ARGS)

FILES ?= 2000
stress: $(READY)
	@PYTHONPATH="$(CURDIR)/tests:$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))" $(PY) -m cache_stress $(ARGS)
	@PYTHONPATH="$(CURDIR)/tests:$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))" $(PY) -m format_mutations --files $(FILES)

test-gpu: $(READY)
	@TRITON_INTERPRET=0 $(PY) -m pytest -m gpu $(ARGS)

tune: $(READY)
	@$(PY) -m weaver_kernels.tune $(ARGS)

OUT ?=
gpu: $(READY)
	@PYTHONPATH="$(CURDIR)/tests:$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))" $(PY) -m operations.gpu_run $(if $(OUT),--out "$(OUT)") $(ARGS)

bench: $(READY)
	@$(PY) -m benchmarks.context_attention $(ARGS)

bench-whole: $(READY)
	@$(PY) -m benchmarks.end_to_end $(ARGS)

evaluate: $(READY)
	@$(PY) -m benchmarks.embedded_evaluation $(ARGS)

DRAWINGS := noto@1.2.9 noto-v1@1.2.5 twemoji@1.2.5 fxemoji@1.2.2 streamline-emojis@1.2.4 emojione@1.2.3 fluent-emoji-flat@1.2.6
DRAWINGS += boxicons@1.2.0 griddy-icons@1.2.0 hugeicons@1.2.35 icon-park-outline@1.2.4 lucide@1.2.137 lucide-lab@1.2.3
DRAWINGS += mdi@1.2.3 ph@1.2.2 streamline-flex@1.2.3 tabler@1.2.41
sprites: $(READY_TRAIN)
	@npm install --silent --no-save --prefix build/npm $(DRAWINGS:%=@iconify-json/%)
	@$(PY) -m weaver.embedded.render_sprites build/npm/node_modules

train-embedded: $(READY_TRAIN)
	@$(PY) -m weaver.embedded.training all $(ARGS)
	@$(PY) -m benchmarks.rederive --after derive

rederive: $(READY)
	@$(PY) -m benchmarks.rederive $(ARGS)

$(VENV)/.ready: $(SETUP_FILES)
	@for candidate in python3 python3.13 python3.12 python3.11 python; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then base=$$candidate; break; fi; \
	done; \
	if [ -z "$$base" ]; then echo "No Python 3.11 or newer found; install one, or name it: make demo PYTHON=..." >&2; exit 1; fi; \
	echo "Setting up $(VENV) with $$("$$base" --version): PyTorch first, then the rest; a few minutes, once."; \
	if ! $(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	  "$$base" -m venv --clear $(VENV) || { echo "Could not make $(VENV); on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
	@$(PIP) install --no-compile -c constraints.txt torch
	@$(PIP) install --no-compile -c constraints.txt -e '.[test]'
	@$(COMPILE)
	@touch $@

$(VENV)/.ready-train: $(VENV)/.ready
	@$(PIP) install -c constraints.txt -e '.[test,train]'
	@touch $@

# torch and torchvision come together, so that they fit; the project itself runs from this folder.
$(MASKS_VENV)/.ready: setup.py
	@python3 -m venv --clear $(MASKS_VENV)
	@$(MASKS_VENV)/bin/python -m pip --disable-pip-version-check -q install torch torchvision
	@$(MASKS_VENV)/bin/python -m pip --disable-pip-version-check -q install '.[test,masks]'
	@$(MASKS_VENV)/bin/python -m pip --disable-pip-version-check -q uninstall -y concept-weaver
	@touch $@
