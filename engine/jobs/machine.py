"""The machine of a run: which numbers its U-Nets compute in, which algorithms it may take, and how much memory it took."""

import os
import sys
from collections.abc import Callable

import torch

from potstill.engine.common.errors import UserError
from potstill.engine.config.schema import Config
from potstill.kernels import native

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def set_up(cfg: Config, device: torch.device, say: Callable[[str], None]) -> tuple[torch.dtype, str]:
    """Set this process up as the settings want it. Returns the dtype that the U-Nets compute in, and why."""
    found = precision(cfg.precision, device)
    algorithms = set_algorithms(cfg.cudnn_benchmark, cfg.deterministic, device)
    for note in filter(None, (set_tf32(cfg.tf32, device), algorithms, uncompiled(device))):
        say(note)
    return found


def set_tf32(tf32: bool | None, device: torch.device) -> str:
    """Let float32 matrix products and convolutions on CUDA round their inputs to TF32 (10 bits of mantissa, relative errors
    of 1e-3 in place of 1e-7, several times the speed), or forbid it. None leaves PyTorch's choice: convolutions round,
    products do not. 16-bit nets are not touched. Returns what to tell the user, if anything.
    """
    if tf32 is None:
        return ""
    if device.type != "cuda":
        return f"tf32={str(tf32).lower()} does nothing here: it is of NVIDIA GPUs, and this run is on {device.type}"
    precision = "tf32" if tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # pyright: ignore[reportAttributeAccessIssue]  # torch's types leave it out
    return "float32 convolutions and products on this GPU round to TF32" if tf32 else "float32 on this GPU is IEEE's, without TF32"


#: With which cuBLAS adds up in the same order every time.
WORKSPACES = (":4096:8", ":16:8")


def check_algorithms(benchmark: bool | None, deterministic: bool, device: torch.device) -> None:
    """UserError for a search of what it must not find, and for a cuBLAS that cannot be what it must."""
    if deterministic and benchmark:
        raise UserError(
            "cudnn_benchmark=true takes convolutions by their speed on the day, and deterministic=true wants the same ones every time: unset one of the two"
        )
    if deterministic and device.type == "cuda" and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in WORKSPACES:
        raise UserError(
            f"deterministic=true on a GPU wants CUBLAS_WORKSPACE_CONFIG={WORKSPACES[0]} in the environment, without which cuBLAS adds up in "
            "any order: put it before the command"
        )


def set_algorithms(benchmark: bool | None, deterministic: bool, device: torch.device) -> str:
    """Let cuDNN time its convolutions on every shape that it sees first, of which a training has few, or let PyTorch take
    none but operations that repeat themselves to the bit. Of the whole process. Returns what to tell the user, if anything.
    """
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic and benchmark is not False
    if benchmark is not None and device.type != "cuda":
        return f"cudnn_benchmark={str(benchmark).lower()} does nothing here: it is of NVIDIA GPUs, and this run is on {device.type}"
    return ""


def uncompiled(device: torch.device) -> str:
    """What of csrc/ a CPU does without, or ""."""
    if device.type != "cpu" or native.used():
        return ""
    return (
        "GroupNorm takes PyTorch's own operations here, and steps take longer: csrc/ is not compiled "
        "(pip install -e . --no-build-isolation does where it finds a C++ compiler) or POTSTILL_BACKEND=reference"
    )


def precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype the U-Nets compute in, and why.

    fp32: 24 bits of mantissa (see set_tf32 for GPUs). bf16: 8 bits and float32's range, so a D(x) within 1e-2 and no scaling
    of losses. Statistics, softmax, embeddings, preconditioning, losses, weights and optimiser are float32 in both.
    fp16 has 11 bits, but gradients below 6e-8 are 0 in it, and SongUNets overflow it: without loss scaling, which is not
    here, it does not train, so it is refused; `Denoiser.compute_dtype` takes it for sampling.
    """
    if name != "auto":
        if name not in PRECISIONS:
            raise UserError(f"precision wants auto, fp32, bf16, got {name!r}")
        if name == "fp16":
            raise UserError("precision=fp16 cannot train: small gradients vanish and large activations overflow; use bf16 or auto")
        return PRECISIONS[name], "asked for"
    if device.type == "cuda":
        return (torch.bfloat16, "the GPU has it") if torch.cuda.is_bf16_supported() else (torch.float32, "the GPU lacks bf16")
    if torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this CPU multiplies tiles of bf16 in hardware"
    if torch.cpu._is_avx512_bf16_supported() and not native.used():
        return torch.bfloat16, "this CPU multiplies bf16 in hardware"
    return torch.float32, "the fastest of this CPU"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float | None:
    """The most memory so far: of the GPU's allocator, or of the whole process on a CPU; None where nobody says (Windows)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


def device_title(device: torch.device) -> str:
    """What results name as the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"


def versions() -> dict[str, str]:
    """What results name as the software."""
    return {"torch": torch.__version__, "python": sys.version.split()[0]}
