# What one types: `make` lists it. Everything runs from .venv, which `make setup` builds.

PYTHON ?= python3
ARGS ?=
TASKS := $(notdir $(wildcard tasks/*))
TOOL := $(or $(wildcard .venv/bin/python),$(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help setup demo chat ask test gpu-check litert-env test-litert clients-env test-clients results lint lock new-task clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: .venv/.installed ## build .venv with everything that training and tests need; does nothing when it is up to date

# The stamp is written last, so an interrupted installation goes on with the next `make`.
.venv/.installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another one: make setup PYTHON=python3.12" >&2; exit 2; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; the first time takes a few minutes."
	@.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# --quiet: an error is our one line, without a traceback of the launcher below it. What follows it are the launcher's defaults,
# which it would announce.
demo: setup ## train, evaluate and compare a chat model on this machine: no GPU, no account
	.venv/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no tasks/chat_sft/train.py $(ARGS)

# `python -m`: the working directory, and so deploy/, is on the path. The page chooses outputs/chat_sft if it is there.
chat: setup ## open a page to chat with the model of `make demo`, or with a packaged one
	.venv/bin/python -m streamlit run deploy/app.py $(ARGS)

# The page is open while documents are indexed beside it, and answers from those that are. Both end together; the next `make ask`
# goes on where this one stopped. The shell lets Ctrl-C pass its background job by: hence the trap.
ask: setup ## open a page that answers from the documentation installed on this machine, with its sources
	@mkdir -p outputs
	@nice .venv/bin/python -m shared.retrieval docs:prose --index outputs/docs.sqlite & trap "kill $$! 2>/dev/null" EXIT INT TERM; \
	TASKBOOK_DOCUMENTS=outputs/docs.sqlite .venv/bin/python -m streamlit run deploy/app.py $(ARGS)

# `pytest`, not `python -m pytest`: the latter would find `shared` in this directory and hide a broken installation.
# A process for each core; each makes for itself what tests share.
test: setup ## run all tests; one of them: make test ARGS="tests/test_layout.py -k arrows"
	.venv/bin/pytest --numprocesses auto --dist worksteal $(ARGS)

# Also in outputs/gpu_check.json. `make test` runs the same with tiny models on a CPU.
gpu-check: setup ## show on a GPU what only a GPU can: kernels, precision, memory, speed; no account, no model hub
	.venv/bin/pytest -m gpu $(ARGS) tests/gpu tests/test_notebook.py

litert-env: .venv-litert/.installed ## build .venv-litert, which `--to litert` needs: TensorFlow and JAX beside PyTorch, 4.6 GB

.venv-litert/.installed: requirements.txt requirements-litert.txt pyproject.toml
	@.venv-litert/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv-litert
	@echo "Installing into .venv-litert; that takes some minutes."
	@.venv-litert/bin/python -m pip install --quiet --quiet --disable-pip-version-check -r requirements-litert.txt
	@touch $@

# Not part of `make test`: the environment is large and takes longer to install than the tests of export take.
test-litert: litert-env ## show that files of TensorFlow Lite give what PyTorch gives, in LiteRT and in TensorFlow
	.venv-litert/bin/python -m pytest -q $(ARGS) tests/export/litert_checks.py

clients-env: .venv-clients/.installed ## build .venv-clients, which `make test-clients` needs: litellm and Gradio, 0.9 GB

.venv-clients/.installed: requirements-clients.txt
	@.venv-clients/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv-clients
	@echo "Installing into .venv-clients; that takes a minute."
	@.venv-clients/bin/python -m pip install --quiet --quiet --disable-pip-version-check -r requirements-clients.txt
	@touch $@

# --noconftest: what tests/conftest.py imports is in .venv, where the server runs. The other clients are tests of `make test`.
test-clients: setup clients-env ## show that litellm, and a person at a chat page of Gradio, can use the API
	.venv-clients/bin/python -m pytest -q --noconftest --disable-warnings $(ARGS) tests/deploy/client_checks.py

# Each command as a user types it; a task that has finished is not run again. What they left is where the table's figures come from.
results: setup ## run the command of every task, an hour in all, and write their figures into the READMEs' table
	@for task in $(TASKS); do test -e outputs/$$task/all_results.json || .venv/bin/accelerate launch --quiet --num_processes 1 \
	  --num_machines 1 --mixed_precision no --dynamo_backend no tasks/$$task/train.py || exit; done
	.venv/bin/python -m shared.compare $(TASKS:%=outputs/%) --readme README.md README.vi.md

lint: setup ## check style and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# The local label of a CPU build of PyTorch (+cpu) is left out: it names no release that everybody can install.
lock: setup ## write requirements.lock: exactly the versions that .venv holds, after `make test` has passed
	@{ echo "# Versions that the tests passed with: $$(.venv/bin/python -V), $$(uname -s) $$(uname -m); written by \`make lock\`."; \
	  echo "# Exactly these: pip install -r requirements.lock -e ."; \
	  .venv/bin/python -m pip list --format=freeze --exclude-editable --exclude pip --exclude setuptools --disable-pip-version-check \
	  | sed 's/+cpu$$//'; } > requirements.lock

new-task: ## start your own task as a copy: make new-task NAME=my_task FROM=chat_sft
	@$(TOOL) tools/new_task.py "$(NAME)" "$(FROM)"

clean: ## remove .venv and caches; your results in outputs/ stay
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -path ./outputs -prune -o -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
