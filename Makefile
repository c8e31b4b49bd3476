# make notebook [EPOCHS=100 DATA=auto ...]   execute S8.ipynb into a folder under runs/; any of its parameters
# make record                                run the defaults on the full data, and publish the result
# make distributed [N=2 EPOCHS=100 ...]      train with N processes, a GPU each, or a share of the cores
# make test                                  check the style and pass the tests
# make bench                                 measure the speed of every part beside what others use
# make soak                                  kill runs, break servers and damage files for twenty minutes

PYTHON ?= python3
N ?= 2
# The parameters are the variables of make's command line. The notebook refuses unknown ones.
PARAMETERS = $(filter-out PYTHON=% CIFAR10_ROOT=%,$(MAKEOVERRIDES))

notebook: .venv/installed
	@.venv/bin/python run_notebook.py $(PARAMETERS)

record: .venv/installed
	@.venv/bin/python run_notebook.py --record $(PARAMETERS)
	@.venv/bin/python benchmarks/tables.py

distributed: .venv/installed
	@.venv/bin/python run_notebook.py --script $(filter-out N=%,$(PARAMETERS))
	@cores=$$(.venv/bin/python -c "import hardware; print(hardware.usable_cores())") && \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( (cores + $(N) - 1) / $(N) ))} \
	  .venv/bin/python -m torch.distributed.run --nproc-per-node=$(N) S8.py

test: .venv/installed
	@.venv/bin/python -m ruff check --quiet
	@.venv/bin/python -m ruff format --check --quiet
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal

bench: .venv/installed
	@.venv/bin/python benchmarks/bench.py

soak: .venv/installed
	@.venv/bin/python tests/soak.py

.venv/installed: requirements.txt
	@[ -w . ] || { echo "expected a clone that can be written, found $(CURDIR): copy it elsewhere"; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11, 4) <= sys.version_info < (3, 14))' \
	  || { echo "Python 3.11.4 to 3.13 is needed, $$($(PYTHON) -V) was found: name another, make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --progress-bar on -r requirements.txt
	@touch $@

.PHONY: notebook record distributed test bench soak
