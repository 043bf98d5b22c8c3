# Every target sets itself up: a virtual environment in .venv, torch on its own, then this package with its test tools.
# The second call does nothing until pyproject.toml or constraints/ change. Needs Python 3.11 to 3.14 and nothing else; uv is
# used where it is on PATH (`UV=` for pip all the same).
#
#   make demo PYTHON=python3.12                                    choose the interpreter
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu     torch without CUDA (on Linux, PyPI's torch brings CUDA)
#   make demo TORCH_SPEC='torch>=2.9,<3'                           another torch
#   make demo CONSTRAINTS=                                         the newest releases that pyproject.toml allows

VENV        ?= .venv
PYTHON      ?=
TORCH_SPEC  ?= torch==2.13.0
TORCH_INDEX ?=
WORKERS     ?= 4
AUTOGROUP   ?= as-is
PY          := $(VENV)/bin/python
INSTALLED   := $(VENV)/.installed
# The versions that were tested with this Python. They name neither torch nor what a build of torch brings along (CUDA, Triton):
# TORCH_SPEC and TORCH_INDEX decide on those.
CONSTRAINTS ?= constraints/$$($(PY) -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt
UV          ?= $(shell command -v uv)
INSTALL     := $(if $(UV),$(UV) pip install --python $(PY),$(PY) -m pip install)
# Runs what needs no environment.
SYSTEM_PY   := $(or $(PYTHON),python3)

.DEFAULT_GOAL := help
.PHONY: help setup demo test matrix constraints lint bench figures fuzz fuzz-door fuzz-wire storm chaos ray-chaos attack protos clean

help:
	@echo "make demo    answer questions about a synthetic video with the bundled model"
	@echo "make test    run the whole test suite in WORKERS=4 processes (0: in one)"
	@echo "make matrix  demo and smoke tests with every Python from 3.11 to 3.14 that is here, in fresh environments"
	@echo "             ONLY=\"3.12 3.13\" or ONLY=other (one that is not .venv's); NEWEST=1 with the newest releases instead of"
	@echo "             constraints/, and tells which of them breaks what; KEEP=1 keeps the environments and goes on with them"
	@echo "make constraints  constraints/*.txt anew, from the newest releases that pyproject.toml allows; ONLY=..."
	@echo "make lint    ruff, mypy and import contracts"
	@echo "make bench   benchmarks: engine, accuracy (quick)"
	@echo "make fuzz    2,000 broken media files through the public call (MUTANTS=..., SEED=...)"
	@echo "make fuzz-wire  100,000 broken manifests, lane messages, handshakes and transfers between workers; CASES=n SEED=n"
	@echo "make fuzz-door  broken calls and broken HTTP/2 against a server (CASES=100000, SEED=...)"
	@echo "make storm   ten thousand random operations on a tiny engine; OPERATIONS=n SEED=n"
	@echo "make chaos   three thousand operations on a cluster whose workers are killed and stopped; OPERATIONS=n SEED=n"
	@echo "make ray-chaos  ten minutes of clients of 'sparsevila serve' whose replicas and controller are killed; MINUTES=n SEED=n"
	@echo "make attack  what one tenant notices of another one's attacks, as a table; SECONDS=n of each, AUTOGROUP=off"
	@echo "make figures write benchmarks/results/ into README.md and docs/benchmarks.md"
	@echo "make protos  regenerate code from protos/"
	@echo "make clean   remove caches and build products (the environment stays)"

demo: setup
	@$(VENV)/bin/sparsevila demo

# Bytecode is kept whatever the environment says: each of the many processes that tests start would compile everything anew.
test: setup
	@PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n $(WORKERS) --dist loadgroup

matrix:
	@$(SYSTEM_PY) tests/matrix.py --own $(PY) $(if $(ONLY),--only $(ONLY)) $(if $(NEWEST),--newest) $(if $(KEEP),--keep)

constraints:
	@$(SYSTEM_PY) tests/matrix.py --freeze $(if $(ONLY),--only $(ONLY))

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports

bench: setup
	$(PY) -m benchmarks.engine
	$(PY) -m benchmarks.accuracy --quick

fuzz: setup
	$(PY) -m tests.media.fuzz --mutants $(or $(MUTANTS),2000) --seed $(or $(SEED),0)

fuzz-wire: setup
	@$(PY) -m tests.transport.fuzz_wire --cases $(or $(CASES),100000) --seed $(or $(SEED),0)

fuzz-door: setup
	@GRPC_VERBOSITY=NONE $(PY) -m tests.gateway.fuzz_door --cases $(or $(CASES),100000) --seed $(or $(SEED),0)

storm: setup
	@$(PY) -m tests.engine.storm --operations $(or $(OPERATIONS),10000) --seed $(or $(SEED),0)

chaos: setup
	@$(PY) -m tests.chaos.storm --operations $(or $(OPERATIONS),3000) --seed $(or $(SEED),0)

ray-chaos: setup
	@$(PY) -m tests.chaos.ray_storm --minutes $(or $(MINUTES),10) --seed $(or $(SEED),0)

attack: setup
	@GRPC_VERBOSITY=NONE $(PY) -m benchmarks.attack --seconds $(or $(SECONDS),20) --autogroup $(AUTOGROUP)

figures: setup
	@$(PY) -m benchmarks.write_docs

# The descriptor keeps the file's public name, sparsevila/v1/video_qa.proto; only the Python modules move into the package.
protos: setup
	@rm -rf build/pb && mkdir -p build/pb sparsevila_cluster/pb
	@$(PY) -m grpc_tools.protoc -I protos --python_out=build/pb --pyi_out=build/pb --grpc_python_out=build/pb \
		protos/sparsevila/v1/video_qa.proto
	@for file in build/pb/sparsevila/v1/*; do \
		sed 's/^from sparsevila\.v1 import/from sparsevila_cluster.pb import/' $$file > sparsevila_cluster/pb/$$(basename $$file); \
	done

clean:
	rm -rf .matrix build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis out sparsevila-demo
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml $(wildcard constraints/*.txt) | $(PY)
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH_SPEC)'
	@file="$(CONSTRAINTS)"; test -f "$$file" && set -- -c "$$file"; set -x; $(INSTALL) -e '.[dev]' "$$@"
	@touch $@

$(PY):
	@found=; \
	for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
		if $$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then \
			found=$$python; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "No usable Python: need Python 3.11 to 3.14 with venv (Debian and Ubuntu: apt install python3-venv)." >&2; \
		echo "Point to one with: make PYTHON=/path/to/python3.12 ..." >&2; \
		exit 1; \
	fi; \
	echo "$$($$found --version) -> $(VENV)"; \
	$$found -m venv $(VENV)
