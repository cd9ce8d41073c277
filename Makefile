# make serve   set up .venv, make a demo model unless MODEL is given, run a node in the foreground
# make test    set up the same way and run the tests
# make soak    the rounds of faults, repeated; figures are kept in benchmarks/results
# make parity  1,000 requests to dynamo.sglang and to sgnode, and how the answers differ (about a quarter of an hour)
# make serve-disagg   a prefill node, a decode node and one frontend on this machine; Ctrl-C drains both in order
# MODEL=/path ARGS="--tp-size 2" make serve   any model, any flag of `sgnode serve`
PYTHON ?= python3
VENV ?= .venv
MODEL ?=
ARGS ?=
TESTS ?= tests

bin := $(VENV)/bin
log := $(VENV)/setup.log
demo := models/demo-llama
gpu := $(shell command -v nvidia-smi 2>/dev/null)
pins := $(wildcard requirements/*.txt) $(wildcard cpu-kernels/*.toml cpu-kernels/*.py cpu-kernels/sgl_kernel/*.py) pyproject.toml
pip = $(bin)/python -m pip install --disable-pip-version-check --no-input
say = @printf '%s\n'
# Output goes to a log; when a step fails its end is shown.
quiet = >>$(log) 2>&1 || { tail -n 20 $(log); echo "make setup failed; the whole log: $(log)"; exit 1; }

.PHONY: setup serve serve-disagg test soak lint parity clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.ready: $(pins)
	$(say) "setting up $(VENV) (a few minutes the first time; log: $(log))"
	@test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(gpu),)
	$(say) "  1/4 torch for the CPU"
	@$(pip) torch==2.13.0 $(quiet)
	$(say) "  2/4 SGLang, Dynamo and what they need"
	@$(pip) --no-deps -r requirements/cpu.txt $(quiet)
	@$(bin)/python cpu-kernels/patch_installed.py $(quiet)
	$(say) "  3/4 the stand-in for SGLang's kernels, test tools"
	@$(pip) --no-deps -r requirements/dev.txt $(quiet)
	@$(pip) --no-deps --no-build-isolation --force-reinstall ./cpu-kernels $(quiet)
else
	$(say) "  1/4 SGLang with its kernels"
	@$(pip) -r requirements/gpu.txt $(quiet)
	$(say) "  2/4 Dynamo"
	@$(pip) --no-deps -r requirements/gpu-dynamo.txt $(quiet)
	$(say) "  3/4 test tools"
	@$(pip) --no-deps -r requirements/dev.txt $(quiet)
endif
	$(say) "  4/4 sgnode"
	@$(pip) --no-deps --no-build-isolation -e . $(quiet)
	@touch $@
	$(say) "done: $(bin)/sgnode"

$(demo)/config.json: | setup
	@$(bin)/sgnode demo-model $(demo)

serve: setup $(if $(MODEL),,$(demo)/config.json)
	@exec $(bin)/sgnode serve $(or $(MODEL),$(demo) --served-model-name demo) $(ARGS)

serve-disagg: setup $(if $(MODEL),,$(demo)/config.json)
	@exec $(bin)/python -m procs.cli.disagg $(or $(MODEL),$(demo) --served-model-name demo) $(ARGS)

lint: setup
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

test: setup
	$(bin)/python -m pytest $(TESTS)

soak: setup
	SGNODE_SOAK=1 SGNODE_SOAK_RESULTS=$(CURDIR)/benchmarks/results/soak-$$(date +%F).jsonl $(bin)/python -m pytest -m soak --timeout 3600 $(TESTS)

parity: setup
	$(bin)/python -m tests.parity

clean:
	rm -rf $(VENV) models
