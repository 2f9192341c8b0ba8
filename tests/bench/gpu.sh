#!/usr/bin/env bash
# GPU run sheet: what needs a GPU, in one go, in under eight minutes. Run it in the root with distrain's packages
# importable (no Ray needed). Writes $OUT/gpu.json (default: ./gpu.json): hardware, versions, the outcome of the gpu
# tests, images/s of the loader in its geometries over decode threads and hardware decoder load, and of AlexNet's step;
# and gpu-science.json: what optimizer, exact sums and response normalisation cost there.
set -uo pipefail
out=${OUT:-.}
timeout 150 python3 -m pytest -m gpu -q 2>&1 | tee "$out/gpu-tests.log"
GPU_TESTS=${PIPESTATUS[0]} python3 tests/bench/gpu.py "$out/gpu.json"
timeout 120 python3 tests/bench/science.py optimizer reduction lrn | tee "$out/gpu-science.json"
