# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv once and then runs in it.
PYTHON ?= python3
RUN := .venv/bin/python
WORKERS ?= 2
STAMP := .venv/.installed

.PHONY: demo test bench kernels-aot csrc-torches gpu lint clean .venv

demo: $(STAMP)  ## train a teacher on handwritten digits, distil it into one step, write runs/digits/report.html
	$(RUN) -m engine.train configs/digits.yaml

# One thread a worker: the nets of the tests are too small for more, and threads that share a core wait for each other.
test: $(STAMP)  ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

bench: $(STAMP)  ## the benches this machine can run
	$(RUN) -m pytest benches --benchmark -q

kernels-aot: $(STAMP)  ## compile every kernel for sm_80 and sm_90; no GPU needed
	$(RUN) -m kernels.aot

csrc-torches: $(STAMP)  ## compile csrc/ against the oldest, the pinned and the newest torch's headers; or NEWEST=2.14.1
	$(RUN) csrc/torches.py $(if $(NEWEST),--newest $(NEWEST))

# PLAN, MINUTES, REHEARSE, PACK … are variables of benches/gpu.py, in the environment or after `make gpu`.
export PLAN MINUTES REHEARSE PACK RESULTS DATA FEATURES RECIPE SECONDS TEACHER_SECONDS SWITCH_SECONDS GPU_STEPS GPU_LIST REDO
gpu:  ## what needs a GPU, in MINUTES=12; uses .venv if there is one, else $(PYTHON) as it is; REHEARSE=1 tries it on a CPU
	$(if $(REHEARSE),POTSTILL_REHEARSE=1) $$(test -x $(RUN) && echo $(RUN) || echo $(PYTHON)) benches/gpu.py

lint: $(STAMP)
	$(RUN) -m pip install -q -c constraints.txt "ruff>=0.8" "pyright>=1.1.390"
	.venv/bin/ruff check . && .venv/bin/pyright

.venv: $(STAMP)

# torch comes first and only through constraints.txt; --no-build-isolation lets setup.py see it, and compile csrc/.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.c* csrc/*.h csrc/build_flags.py)
	$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv  # whole or made again
	$(RUN) -m pip install -q -c constraints.txt torch "setuptools>=77" "ninja>=1.11"
	$(RUN) -m pip install -q -c constraints.txt --no-build-isolation -e ".[test]"
	touch $(STAMP)

clean:
	rm -rf .venv build *.egg-info
