#!/usr/bin/env bash
# GPU run sheet: what needs a GPU, in one go. Run it in the project's root with distrain's packages importable.
# Writes $OUT/gpu.json (default: ./gpu.json): hardware, versions, the outcome of the gpu tests, images/s of AlexNet's step.
set -uo pipefail
out=${OUT:-.}
python3 -m pytest -m gpu -q 2>&1 | tee "$out/gpu-tests.log"
GPU_TESTS=${PIPESTATUS[0]} OUT="$out" python3 - <<'PY'
import json, os, time
import torch
from distrain.config import Model
from distrain.losses import cross_entropy
from distrain.model import build, randomness
from distrain.world import environment

device = torch.device("cuda", 0)
found = {"environment": environment(device), "gpu_tests_exit_code": int(os.environ["GPU_TESTS"]), "images_per_second": {}}
for name in ("alexnet", "alexnet2012"):
    model = build(Model(name=name), 1000, seed=0).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        images, labels = torch.randn(512, 3, 224, 224, device=device), torch.arange(512, device=device)
        for repeat in range(25):
            if repeat == 5:
                torch.cuda.synchronize()
                began = time.monotonic()
            with randomness(0, repeat, 0), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = cross_entropy(model(images).float(), labels).sum()
            torch.autograd.grad(loss, list(model.parameters()))
        torch.cuda.synchronize()
        rate = 20 * 512 / (time.monotonic() - began)
        found["images_per_second"][f"{name} forward and backward {dtype}"] = round(rate)
with open(os.path.join(os.environ["OUT"], "gpu.json"), "w") as file:
    json.dump(found, file, indent=1)
print(json.dumps(found, indent=1))
PY
