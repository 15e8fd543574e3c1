"""torch.compile of a method's nets as one switch, in place: `nn.Module.compile()` changes neither keys nor modules.

blocks: each block (`Denoiser.blocks`) by itself. Blocks of one shape share a graph, so this is the shorter wait. net: each net in one
graph, which lets the compiler see across blocks. Both compute what the eager net does up to the order of sums in float32
and below; dropout draws other masks. Frozen views are compiled as well; the EMA, which is only sampled from, is not.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from potstill.engine.common.errors import UserError
from potstill.engine.nets.denoiser import Denoiser
from potstill.kernels._triton import INSTALLED

MODES = ("off", "blocks", "net")

#: Graphs a module may want: training or not, with gradients or without, and what differs between a net and its views.
VARIANTS = 8


def check_compile(mode: str, device: torch.device, where: str) -> None:
    """UserError for a mode that this machine cannot do."""
    if mode != "off" and device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise UserError(f"{where}={mode} on a CPU wants a C++ compiler, and there is no g++ or clang++: install one, or use off")
    if mode != "off" and device.type == "cuda" and not INSTALLED:
        raise UserError(f"{where}={mode} on CUDA wants triton >= 3.6, got none: pip install triton, or use off")


def compile_nets(nets: Iterable[nn.Module], mode: str, device: torch.device, *, backend: str = "inductor") -> int:
    """Compile the denoisers' nets in these modules in place; how many modules that made. Work is done at their first call."""
    if mode == "off":
        return 0
    denoisers = [module for net in nets for module in net.modules() if isinstance(module, Denoiser)]
    parts = [part for one in denoisers for part in ([one.model] if mode == "net" else one.blocks())]
    found = list({id(part): part for part in parts}.values())
    options: dict[str, Any] = {}
    if backend == "inductor" and device.type == "cuda":
        # One convolution with fewer channels out than half of those in vetoes NHWC for a whole training graph, and a
        # U-Net's decoder has many; the rest are on tensor cores, which want it.
        options = {"options": {"force_layout_optimization": True}}
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS * len(found))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, VARIANTS * len(found))
    for module in found:
        module.compile(backend=backend, dynamic=False, **options)
    return len(found)


def cache_in(folder: Path) -> None:
    """Keep compiled code in the run folder, so that a resumed run finds it; a cache the user has named stays."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((folder / "compiled").resolve()))
