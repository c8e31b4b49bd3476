# make notebook [EPOCHS=100 DATA=auto ...]   execute S8.ipynb in place; any parameter of its first code cell
# make distributed [N=2 EPOCHS=100 ...]      train with it on N processes, a GPU each, or a share of the cores
# make test                                  pass the tests
# make bench                                 measure the speed of every part beside what others use
# make soak                                  kill runs, break servers and mutate files for twenty minutes

PYTHON ?= python3
N ?= 2
# The parameters are the variables given on make's command line, whatever they are called: the notebook refuses unknown ones.
# CIFAR10_ROOT reaches it through the environment.
PARAMETERS = $(filter-out PYTHON=% CIFAR10_ROOT=%,$(MAKEOVERRIDES))

notebook: .venv/installed
	@.venv/bin/python run_notebook.py $(PARAMETERS)

distributed: .venv/installed
	@.venv/bin/python run_notebook.py --script $(filter-out N=%,$(PARAMETERS))
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( ($$(nproc) + $(N) - 1) / $(N) ))} .venv/bin/torchrun --nproc-per-node=$(N) S8.py

test: .venv/installed
	@.venv/bin/python -m pytest

bench: .venv/installed
	@.venv/bin/python benchmarks/bench.py

soak: .venv/installed
	@.venv/bin/python tests/soak.py

.venv/installed: requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11, 4) <= sys.version_info < (3, 14))' \
	  || { echo "Python 3.11.4 to 3.13 is needed, $$($(PYTHON) -V) was found: name another, make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --progress-bar on -r requirements.txt
	@touch $@

.PHONY: notebook distributed test bench soak
