"""A folder that Hugging Face's diffusers loads as a pipeline, with nothing of ours installed.

model_index.json    which classes in which files, and how the student is sampled
pipeline.py         noise to images; unet/denoiser.py: the net, EDM's or EDM2's (from `engine/formats/standalone`)
unet/               config.json with their keyword arguments, diffusion_pytorch_model.safetensors
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from potstill.engine.common.errors import UserError
from potstill.engine.common.writing import save_tensors
from potstill.engine.nets.edm2 import EDM2Denoiser
from potstill.engine.nets.edm_denoiser import EDMDenoiser

FILES = Path(__file__).parent / "standalone"
SOLVERS = ("one_step", "ancestral", "renoise", "euler")  # what pipeline.py knows
DIFFUSERS = "0.30.0"  # the form of the files; written where diffusers puts its version


def write_diffusers(net: EDMDenoiser, sampler: dict[str, Any], folder: Path, metadata: dict[str, str]) -> None:
    """The files into a folder that exists. UserError for a way of sampling that pipeline.py does not know."""
    if sampler["solver"] not in SOLVERS:
        raise UserError(f"the diffusers pipeline samples by {', '.join(SOLVERS)}, this file wants {sampler['solver']}")
    unet = folder / "unet"
    unet.mkdir()
    shutil.copyfile(FILES / "pipeline.py", folder / "pipeline.py")
    shutil.copyfile(FILES / ("edm2_denoiser.py" if isinstance(net, EDM2Denoiser) else "denoiser.py"), unet / "denoiser.py")
    _write(
        folder / "model_index.json",
        {
            "_class_name": ["pipeline", "StudentPipeline"],
            "_diffusers_version": DIFFUSERS,
            "sampler": sampler,
            "unet": ["denoiser", "Denoiser"],
        },
    )
    kwargs = {k: v for k, v in net.kwargs.items() if v != math.inf}  # JSON has no infinity, and it is the default
    described = {"_class_name": "Denoiser", "_diffusers_version": DIFFUSERS, "precond": net.precond, "net": kwargs}
    _write(unet / "config.json", described)
    tensors = {name: t.detach().cpu().contiguous() for name, t in net.state_dict().items()}
    save_tensors(tensors, unet / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"} | metadata)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
