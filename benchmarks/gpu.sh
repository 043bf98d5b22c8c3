#!/usr/bin/env bash
# Everything about the kernels and engines that only a GPU can show, in one command and under nine minutes. Needs Python with torch,
# triton and transformers; no network, no installation of this package.
#
#   benchmarks/gpu.sh [--out DIR] [--wheels DIR] [--toy]
#
#   --out DIR      where results are written (default: benchmarks/results); a folder named as the only argument is the same
#   --wheels DIR   wheels of what the machine lacks; they are unpacked for this run alone
#   --toy          tiny sizes, to see that it runs; what a machine without a GPU does in any case
#
# PYTHON names the interpreter (default: python3). The last line on stdout is one JSON document.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
