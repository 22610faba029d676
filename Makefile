# Every target sets up .venv by itself; nothing but Python 3.11 or later with pip, and make, need be there.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin

.PHONY: help install demo check quick test mutants bench same slower dist clean
.NOTPARALLEL:

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: .venv/installed  ## set up .venv with the command .venv/bin/peertune

.venv/installed .venv/developing: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.$(if $(filter %developing,$@),[dev])'
	touch .venv/installed $@

# In float32, on the CPU, by one thread each: what it prints is the README's table, whatever the machine.
demo: .venv/installed  ## ten clients on handwritten digits who seldom meet: two methods, alone, and with a server, over five seeds
	rm -rf runs/demo
	OMP_NUM_THREADS=1 $(BIN)/peertune sweep digits-demo algorithm.name=local,dec_lora,tad_lora graph.activation=0.1 seed=0,1,2,3,4 rounds=40 training.local_steps=3 \
		training.per_device_train_batch_size=4 training.learning_rate=1e-2 evaluate.every=20 --stack --out runs/demo --jobs 2
	OMP_NUM_THREADS=1 $(BIN)/peertune sweep digits-demo algorithm.name=dec_lora graph.activation=1 seed=0,1,2,3,4 rounds=40 training.local_steps=3 \
		training.per_device_train_batch_size=4 training.learning_rate=1e-2 evaluate.every=20 --stack --out runs/demo/server --jobs 2
	$(BIN)/peertune compare runs/demo --by algorithm.name,graph.activation --paired-with dec_lora \
		--metric mean,min,max,average,consensus_error_A,consensus_error_B,cross_term,megabytes_sent,seconds
	$(BIN)/peertune report runs/demo

check: .venv/developing  ## style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests start hundreds of processes; each takes what another has compiled, whatever the environment says.
test: .venv/developing  ## the whole test suite
	HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses 4 --dist loadscope --no-loadscope-reorder

quick: .venv/developing  ## the tests that start no process, no browser and no whole run
	HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -m 'not thorough' --numprocesses 2 --dist worksteal

# Beside the working tree, with a configuration of its own: mutmut reads which files from pyproject.toml alone.
mutants: .venv/developing  ## how many small changes of FILES="peertune/..." do TESTS="tests/..." catch (ONLY='*3': a tenth of them; not in CI)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[mutants]'
	rm -rf .mutants && mkdir .mutants && cp -r peertune tests docs examples README.md Makefile pyproject.toml .mutants
	printf '\n[tool.mutmut]\nsource_paths = ["peertune"]\nonly_mutate = [$(foreach file,$(FILES),"$(file)",)]\n' >> .mutants/pyproject.toml
	printf 'pytest_add_cli_args_test_selection = [$(foreach file,$(TESTS),"$(file)",)]\n' >> .mutants/pyproject.toml
	printf 'process_isolation = "forkserver"\n' >> .mutants/pyproject.toml  # a process that has used gRPC can't be forked
	cd .mutants && OMP_NUM_THREADS=1 ../$(BIN)/mutmut run --max-children 1 $(if $(ONLY),'$(ONLY)') && ../$(BIN)/mutmut results | sed '/not checked/d'

bench: .venv/developing  ## measure speed (an hour; SST2=FOLDER to read SST-2 from there, PARTS="step growth" for some, OLD=COMMIT to compare)
	SST2=$(SST2) $(BIN)/python -m benchmarks $(PARTS) $(if $(OLD),--old $(OLD))

same: .venv/developing  ## whether the working tree comes to the same bits as OLD=COMMIT, by all methods and engines (minutes)
	$(BIN)/python -m benchmarks.same $(OLD)

slower: .venv/developing  ## whether the working tree is slower than OLD=COMMIT, in turn (half an hour, on a quiet machine)
	$(BIN)/python -m benchmarks.slower $(OLD)

dist: .venv/developing  ## build the wheel and the sdist into dist/
	rm -rf dist
	$(BIN)/hatchling build

clean:  ## remove .venv and caches
	rm -rf .venv .mutants .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
