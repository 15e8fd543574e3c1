# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv once and then runs in it.
PYTHON ?= python3
RUN := .venv/bin/python
WORKERS ?= 2
STAMP := .venv/.installed

.PHONY: demo test docs diffusers fuzz soak bench kernels-aot csrc-torches gpu lint lock clean .venv

demo: $(STAMP)  ## train a teacher on handwritten digits, distil it into one step, write runs/digits/report.html
	$(RUN) -m engine.train configs/digits.yaml

# One thread a worker: the nets of the tests are too small for more, and threads that share a core wait for each other.
test: $(STAMP)  ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

diffusers: $(STAMP)  ## the extra of that name, 40 MB, into .venv: without it `make test` skips what wants diffusers
	$(call LOCKED,diffusers)
	$(RUN) -m pip check

fuzz: $(STAMP)  ## damaged and hostile files for every reader, N=10000 new ones; SEED=n makes the same again
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(RUN) -m fuzz $(or $(N),10000) $(if $(SEED),--seed $(SEED))

bench: $(STAMP)  ## the benches this machine can run
	$(RUN) -m pytest benches --benchmark -q

soak: $(STAMP)  ## disturb tiny runs of every method in every way, MINUTES=20 at most; the same command goes on
	$(RUN) -m benches.scripts.soak

kernels-aot: $(STAMP)  ## compile every kernel for sm_80 and sm_90; no GPU needed
	$(RUN) -m kernels.aot

csrc-torches: $(STAMP)  ## compile csrc/ against the oldest, the pinned and the newest torch's headers; or NEWEST=2.14.1
	$(RUN) csrc/torches.py $(if $(NEWEST),--newest $(NEWEST))

# PLAN, MINUTES, REHEARSE, PACK … are variables of benches/scripts/gpu.py, in the environment or after `make gpu`.
export PLAN MINUTES REHEARSE PACK RESULTS DATA FEATURES RECIPE SECONDS TEACHER_SECONDS SWITCH_SECONDS GPU_STEPS GPU_LIST REDO
gpu:  ## what needs a GPU, in MINUTES=12; uses .venv if there is one, else $(PYTHON) as it is; REHEARSE=1 tries it on a CPU
	$(if $(REHEARSE),POTSTILL_REHEARSE=1) $$(test -x $(RUN) && echo $(RUN) || echo $(PYTHON)) -m benches.scripts.gpu

lint: $(STAMP)  ## ruff, its format, and pyright over everything but the tests' types
	$(call LOCKED,lint)
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/pyright

docs: $(STAMP)  ## the pages of docs/ as a site, build/docs/index.html; a warning is an error; no network once it is installed
	$(call LOCKED,docs)
	$(RUN) -m sphinx -q -W --keep-going -E -b html docs build/docs

lock:  ## constraints.txt anew; NEWER="ruff numpy" for newer ones, NEWER=all (see .ci/lock.py)
	$(PYTHON) -m venv build/lock && build/lock/bin/python -m pip install -q uv==0.13.8
	build/lock/bin/python .ci/lock.py $(NEWER)

.venv: $(STAMP)

# Installs a paragraph of constraints.txt: files whose hashes it has, and no other.
LOCKED = sed -n '/^\# $(1):/,/^$$/p' constraints.txt > .venv/locked.txt && \
	$(RUN) -m pip install -q --require-hashes --no-deps --no-build-isolation -r .venv/locked.txt

# The CUDA libraries come only where the PyTorch that pip found asks for them. --no-build-isolation lets setup.py see PyTorch, and
# compile csrc/; pip check says what the lock lacks of what pyproject.toml asks for.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.c* csrc/*.h csrc/build_flags.py)
	$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv  # whole or made again
	$(call LOCKED,build)
	$(call LOCKED,cpu) 2> .venv/cpu.txt || if grep -A 99 "DO NOT MATCH THE HASHES" .venv/cpu.txt; then exit 1; else \
		echo "PyPI's PyTorch is taken; of the one without CUDA pip says: $$(grep -m 1 ERROR .venv/cpu.txt)"; fi
	$(call LOCKED,run)
	if $(RUN) -m pip show torch | grep -q '^Requires:.*nvidia-'; then $(call LOCKED,cuda); fi
	$(RUN) -m pip install -q --no-deps --no-build-isolation -e .
	$(RUN) -m pip check
	touch $(STAMP)

clean:
	rm -rf .venv build *.egg-info
