# Everything a person types. `make demo` and `make test` set up what they need on a bare machine.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

CLUSTER ?= auto
PROFILE ?= full
export FINETUNE_CACHE ?= $(HOME)/.cache/finetune-operator
export PYTHONPATH := $(CURDIR):$(CURDIR)/api:$(CURDIR)/operator:$(CURDIR)/trainer-image
PY := .venv/bin/python
PYTEST := $(PY) -m pytest
# What the environment is made from; the settings of linters and tests in pyproject.toml are no part of it.
VENV := .venv/.installed-$(shell { cat requirements/bootstrap.txt requirements/dev.txt; sed '/^\[tool.pytest/,$$d' pyproject.toml; } 2>/dev/null | sha256sum | cut -c1-16)

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 22

# --- set-up -----------------------------------------------------------------------------------------------------

.PHONY: bootstrap
bootstrap:
	@sh hack/bootstrap.sh $(TIER)

$(VENV):
	@sh hack/bootstrap.sh python
	echo "setting up .venv (torch and its libraries: a few minutes on a cold machine)"
	rm -rf .venv
	python3 -m venv .venv
	.venv/bin/pip install --quiet --require-hashes -r requirements/bootstrap.txt
	.venv/bin/uv pip install --quiet --python .venv/bin/python --require-hashes -r requirements/bootstrap.txt -r requirements/dev.txt
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
	touch $@

.PHONY: venv
venv: $(VENV) ## Set up .venv with the locked requirements

.PHONY: lock
lock: $(VENV) ## Rewrite the locked requirements
	@PATH=$(CURDIR)/.venv/bin:$$PATH sh requirements/lock.sh

# --- checks -----------------------------------------------------------------------------------------------------

.PHONY: generate
generate: $(VENV) ## Regenerate crds/, the chart's copy, golden files and reference pages
	@$(PY) -m finetune_api.crd crds charts/finetune-operator/crds
	$(PY) -m hack.generate

.PHONY: verify
verify: generate ## Fail if a generated file differs from its source
	@git diff --exit-code --stat -- crds charts docs tests/render || { echo "run 'make generate' and commit"; exit 1; }

.PHONY: lint
lint: $(VENV) ## ruff, mypy, import contracts, helm lint, schema of the examples
	@sh hack/bootstrap.sh chart
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache --no-logo
	$(PY) -m tests.cluster tools helm > /dev/null
	$(FINETUNE_CACHE)/bin/current/helm lint --strict charts/finetune-operator
	$(PY) -m hack.check_examples

.PHONY: test-unit
test-unit: $(VENV) ## Pure code, under a minute
	@$(PYTEST) tests/unit tests/render -q

.PHONY: test-train
test-train: $(VENV) ## The trainer as processes, with a real S3 server
	@sh hack/bootstrap.sh train
	$(PY) -m tests.cluster tools versitygw > /dev/null
	$(PYTEST) tests/train -n 2 --dist loadfile -q

.PHONY: test-train-full
test-train-full: $(VENV) ## Every method learns its task, the slow cells and curves (40 to 50 minutes)
	@sh hack/bootstrap.sh train
	$(PYTEST) tests/train -n 2 --dist loadfile -q -m slow -s

.PHONY: test-gpu
test-gpu: $(VENV) ## The tests that need a GPU; prints the figures with the device's name
	@$(PYTEST) tests/train -q -m gpu -s

.PHONY: test-api
test-api: $(VENV) ## The operator against a real API server, with simulated nodes
	@sh hack/bootstrap.sh api
	$(PY) -m tests.cluster tools api > /dev/null
	$(PYTEST) tests/api -n 2 --dist loadfile -q
	$(PYTEST) tests/chart tests/cluster_tests/fast -q

.PHONY: test-e2e
test-e2e: $(VENV) ## Chart, images and pods on a real cluster
	@sh hack/bootstrap.sh e2e
	$(PYTEST) tests/cluster_tests/full tests/e2e -q

.PHONY: test-chaos-e2e
test-chaos-e2e: $(VENV) ## Pods, nodes, storage and operator fail under real runs; prints the figures
	@sh hack/bootstrap.sh e2e
	$(PYTEST) tests/e2e -q -m slow -s

.PHONY: test-chaos-short
test-chaos-short: $(VENV) ## Real runs are stopped and killed, their storage fails: the short form
	@sh hack/bootstrap.sh train
	$(PY) -m tests.cluster tools versitygw > /dev/null
	$(PYTEST) tests/chaos -n 2 --dist loadfile -q

.PHONY: test-chaos
test-chaos: $(VENV) ## The long form of the chaos tests, with their figures
	@sh hack/bootstrap.sh train
	$(PY) -m tests.cluster tools versitygw > /dev/null
	failed=0
	$(PY) -m tests.chaos.soak --stops 100 --kills 100 || failed=1
	$(PY) -m tests.chaos.store --faults 9500 || failed=1
	$(PY) -m tests.chaos.store --faults 500 --s3 || failed=1
	$(PY) -m tests.chaos.outages || failed=1
	$(PYTEST) tests/chaos/failures -n 2 -q || failed=1
	exit $$failed

.PHONY: test
test: lint verify test-unit test-train test-chaos-short test-api test-e2e ## All tests; sets everything up

.PHONY: bench-overhead
bench-overhead: $(VENV) ## From kubectl apply to Succeeded minus training, beside the floor
	@sh hack/bootstrap.sh e2e
	$(PY) -m hack.bench_overhead

.PHONY: bench-train
bench-train: $(VENV) ## Tokens per second and peak memory beside TRL's SFTTrainer
	@sh hack/bootstrap.sh train
	$(PY) -m hack.bench_train

.PHONY: bench-save
bench-save: $(VENV) ## What a save costs training, beside saves that it waits for (about 8 minutes)
	@sh hack/bootstrap.sh train
	$(PY) -m tests.cluster tools versitygw > /dev/null
	$(PY) -m hack.bench_save

.PHONY: bench-resume
bench-resume: $(VENV) ## First new step after a resume beside a fresh start, at tiny size
	@sh hack/bootstrap.sh train
	$(PY) -m hack.bench_resume

# --- cluster, images, demo --------------------------------------------------------------------------------------

.PHONY: cluster-up cluster-down cluster-status
cluster-up: $(VENV) ## Start a cluster: CLUSTER=auto|kind|local
	@sh hack/bootstrap.sh e2e
	$(PY) -m tests.cluster up --cluster $(CLUSTER) --profile $(PROFILE)
cluster-down: $(VENV) ## Stop it; images stay cached
	@$(PY) -m tests.cluster down --cluster $(CLUSTER) --profile $(PROFILE)
cluster-status: $(VENV) ## Say what runs
	@$(PY) -m tests.cluster status --cluster $(CLUSTER) --profile $(PROFILE)

.PHONY: images push
images: $(VENV) ## Build the operator, preflight and trainer images
	@sh hack/bootstrap.sh images
	$(PY) -m hack.build_images build
push: $(VENV) ## Push them: make push REGISTRY=registry.example.com/team
	@$(PY) -m hack.build_images push $(REGISTRY)

.PHONY: demo
demo: $(VENV) ## Fine-tune a real model on a real cluster, from nothing
	@sh hack/bootstrap.sh e2e
	$(PY) -m hack.demo --cluster $(CLUSTER)
