"""The denominators: python -m benches.scripts.rates RESULTS. What this machine's tools are, and what its GPU does at best.

Tools that a borrowed machine may lack (gcc, Python.h, nvcc, git, nvidia-smi, ncu) are named and gone without. csrc/ is
compiled in place for this GPU alone where nvcc is there and it is not yet, installing nothing. Then copies, matrix products
and convolutions as PyTorch does them, NCHW and NHWC, at the shapes of the recipes' nets: shares of these are what the other
benches are to be read in. Into RESULTS/tools.json and RESULTS/rates.json.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import conv2d

from benches import ROOT, harness, rehearse, rows
from csrc import build_flags
from potstill.kernels import cuda

PROGRAMS = ("gcc", "g++", "nvcc", "ninja", "git", "nvidia-smi", "ncu")
#: batch, channels, resolution of 3x3 convolutions: CIFAR-10's and FFHQ-64's DDPM++, ImageNet-64's ADM.
CONVOLUTIONS = harness.smallest([(64, 256, 32), (64, 128, 64), (64, 192, 64), (64, 384, 32), (64, 768, 8)], [(1, 8, 4)])
SIDE = 64 if rehearse.REHEARSING else 8192
MOST_SECONDS = 60  # of compiling; the rates are to be measured all the same
COPIED = 1 << 20 if rehearse.REHEARSING else 1 << 30  # bytes


def main(results: Path) -> None:
    rows.write(results / "tools.json", tools() | compile_csrc() | {"machine": harness.machine(harness.CUDA)})
    for case, unit, rate in rates():
        rows.keep(results, {"group": "rates", "kind": "cuda", "case": case, unit: rate})
        print(f"{case}: {rate:.1f} {unit}", flush=True)


def tools() -> dict[str, Any]:
    """Where the programs are, None for those that are missing, and whether extensions can be compiled."""
    found: dict[str, Any] = {name: shutil.which(name) for name in PROGRAMS}
    found["Python.h"] = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    for name in [name for name, there in found.items() if not there]:
        print(f"{name} is missing here: what needs it is left out", flush=True)
    return found


def compile_csrc() -> dict[str, Any]:
    """Compile csrc/ in place where that is possible and needed; how long it took, or why it is not there."""
    if cuda.built() or shutil.which("nvcc") is None or torch.version.cuda is None:
        return {"csrc": cuda.built(), "csrc_seconds": None}
    major, minor = torch.cuda.get_device_capability()
    start = time.perf_counter()
    # Not by setup.py: pyproject.toml wants a setuptools that a borrowed machine may not have.
    folder, name = ROOT / "build/rates", cuda.LIBRARY.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(build_flags.cuda_ninja_file(folder / name, archs=[10 * major + minor]))
    try:
        subprocess.run([build_flags.ninja() or "ninja", "-C", str(folder)], check=True, timeout=MOST_SECONDS)
        os.replace(folder / name, cuda.LIBRARY)  # whole or not at all
    except (OSError, subprocess.SubprocessError) as error:
        print(f"csrc/ does not compile here (above; {error}): the rows of the backend 'cuda' are left out", flush=True)
    return {"csrc": cuda.built(), "csrc_seconds": round(time.perf_counter() - start, 1)}


def rates():
    """(case, unit, rate): bytes count read and written, an addition and a product are two operations."""
    device = harness.CUDA.device
    bf16 = {"device": device, "dtype": torch.bfloat16}
    a, b = (torch.ones(COPIED // 4, device=device) for _ in range(2))
    yield "copy", "GB/s", 2 * COPIED / seconds_of(lambda: b.copy_(a)) / 1e9
    x, y = (torch.randn(SIDE, SIDE, **bf16) for _ in range(2))
    yield f"matrix product {SIDE}, bf16", "TFLOP/s", 2 * SIDE**3 / seconds_of(lambda: x @ y) / 1e12
    before = torch.backends.cuda.matmul.fp32_precision
    for name in ("tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = name
        p, q = (torch.randn(SIDE // 2, SIDE // 2, device=device) for _ in range(2))
        yield f"matrix product {SIDE // 2}, float32 {name}", "TFLOP/s", 2 * (SIDE // 2) ** 3 / seconds_of(lambda: p @ q) / 1e12
    torch.backends.cuda.matmul.fp32_precision = before
    for n, c, side in CONVOLUTIONS:
        image, weight = torch.randn(n, c, side, side, **bf16), torch.randn(c, c, 3, 3, **bf16)
        for words, layout in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            i, w = image.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
            rate = 2 * 9 * c * c * n * side**2 / seconds_of(lambda: conv2d(i, w, padding=1)) / 1e12
            yield f"convolution {n}x{c}x{side}x{side}, bf16, {words}", "TFLOP/s", rate


def seconds_of(call: Callable[[], Any]) -> float:
    """Median seconds of ten, after three that do not count."""
    for _ in range(3):
        call()
    return median(harness.cuda_seconds(call) for _ in range(10))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
