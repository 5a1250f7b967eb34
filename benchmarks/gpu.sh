#!/usr/bin/env bash
# The GPU part of the test suite, on a machine that has a GPU, with the Python and torch that are there
# and without a network. Everything it finds out goes into one folder: $OUT, else gpu-output/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-gpu-output}
mkdir -p "$out"

{
  date --utc
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  "$python" -c 'import torch, platform; print("torch", torch.__version__, "python", platform.python_version())'
} | tee "$out/machine.txt"

# TALOS_CUDA=1: a CUDA library that does not build is an error here, not a fallback.
TALOS_CUDA=1 "$python" -m pip install --no-index --no-build-isolation --no-deps -e . 2>&1 | tee "$out/build.txt"
"$python" -m pytest tests -m gpu -q --junitxml="$out/tests.xml" 2>&1 | tee "$out/tests.txt"
