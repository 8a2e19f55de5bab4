#!/usr/bin/env bash
# Everything that is measured on a GPU, in one call under 8 minutes:  bench/gpu.sh OUT
# OUT/gpu.json (for bench/compare.py), OUT/gpu.md and OUT/log.txt. Exit status 0: all numbers were right.
#   bench/gpu.sh --dry-run OUT   goes through all of it on the CPU with small sizes; its speeds mean nothing
# Needs torch, triton, numpy, safetensors, pytest, and for the native module cmake and pybind11. PYTHON chooses the
# interpreter.
set -uo pipefail
dry=()
if [ "${1:-}" = "--dry-run" ]; then
    dry=(--dry-run)
    shift
fi
if [ $# -ne 1 ]; then
    echo "usage: bench/gpu.sh [--dry-run] OUT" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
tests=(tests/kernels)
status=0
{
    if [ ${#dry[@]} -eq 0 ]; then
        # -e: the folder kernels/ is the package pwm_fast.kernels only once installed
        "$python" -m pip install -q --no-build-isolation --no-deps -e . || status=1
    else
        tests=(tests/kernels/test_td_lambda.py)
        export OMP_NUM_THREADS=1
    fi
    timeout 120 "$python" -m pytest -q -p no:cacheprovider -m "not slow" "${tests[@]}" || status=1
    timeout 450 "$python" bench/gpu.py "${dry[@]}" "$out" || status=1
    echo "exit status $status"
    exit $status
} 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
