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
# PYTHON names the interpreter (default: this checkout's .venv, where there is one, else python3). The last line on stdout is one JSON
# document.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
own=.venv/bin/python
python=${PYTHON:-$([ -x "$own" ] && echo "$own" || echo python3)}
if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
	echo "benchmarks/gpu.sh: $python has no torch; PYTHON=... names another interpreter, \`make setup\` makes .venv" >&2
	exit 2
fi
exec "$python" -m benchmarks.lib.gpu_sections "$@"
