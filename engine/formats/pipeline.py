"""A student of a diffusers net as a folder that one line of diffusers loads and one line runs, its scheduler included.

model_index.json, and the teacher's own tokenizers, text encoders and VAE, copied file by file: nothing of them is loaded or rounded
unet/ | transformer/   the student's net
scheduler/             what makes the pipeline's own loop our Sampler on our net (`formats.schedulers`)
pipeline.py            with a scheduler of ours only: the stock class, told how its noise begins

A student of adapters (LoRA) is a file of adapters and its scheduler, for the teacher's own folder.
"""

# diffusers is optional, and untyped.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

import copy
import inspect
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.common.writing import save_tensors
from potstill.engine.diffusion.sampling import ANCESTRAL, RENOISE, Sampler
from potstill.engine.formats.card import HERE
from potstill.engine.formats.schedulers import Plan, plan
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.lora import merged
from potstill.engine.nets.pipelines import class_now, diffusers

FILES = Path(__file__).parent / "standalone"
INDEX = "model_index.json"
LORA = "pytorch_lora_weights.safetensors"
PIXELS = "ConsistencyModelPipeline"  # of UNet2DModel: DDPM's takes neither classes nor a scheduler that scales
OLD = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5", "*.onnx*", "*.pb", "*.xml")  # what is not copied of a component
WARNING = "\n\nA folder cannot store the arguments of a call: with others than these the images are wrong, without a word."
SEED = "\n\nSeed it by `torch.manual_seed`: some pipelines do not pass `generator` on to the steps, which draw fresh noise."


class Made(NamedTuple):
    """What to say about a folder, and Markdown on how it is used."""

    told: str
    use: str


@dataclass
class Teacher:
    """A pipeline's folder as a student takes its place in it: `part` is the name of the denoiser, `pipeline` the class that runs it.

    named: how a model card calls it.
    """

    folder: Path
    index: dict[str, Any]
    part: str
    pipeline: Any
    named: str

    @property
    def components(self) -> dict[str, tuple[str | None, str | None]]:
        """Name -> (library, class), (None, None) for one that is left out, of what model_index.json names."""
        return {name: (value[0], value[1]) for name, value in self.index.items() if isinstance(value, list) and len(value) == 2}


def write_pipeline(net: DiffusersDenoiser, sampler: Sampler, folder: Path, teacher: Path, prompt: str, named: str = "") -> Made:
    """The files into a folder that exists.

    teacher: the folder of the pipeline that the student learnt from, which the card calls `named`; prompt: the one it asks with. UserError for
    a student or a teacher of which no pipeline can be made.
    """
    its = teacher_at(teacher, net, named or str(teacher))
    made = plan(net, sampler, its.pipeline)
    call = call_of(net, made, its, prompt)
    if net.adapters is not None and made.scheduler:
        return write_lora(net, sampler, made, its, folder, call)
    model: Any = (net if net.adapters is None else merged(net)).model
    model.save_pretrained(folder / its.part)
    for name, (library, _) in its.components.items():
        if library and name not in (its.part, "scheduler"):
            copied(its.folder / name, folder / name)
    write_scheduler(made, folder / "scheduler")
    scheduler = ["diffusers", made.scheduler] if made.scheduler else ["student_scheduler", "StudentScheduler"]
    kind = its.pipeline.__name__ if made.scheduler else ["pipeline", "StudentPipeline"]
    write_json(folder / INDEX, its.index | {"_class_name": kind, "_diffusers_version": diffusers().__version__, "scheduler": scheduler})
    load = f"pipe = DiffusionPipeline.from_pretrained({HERE}{'' if made.scheduler else ', trust_remote_code=True'})  # this folder"
    use = snippet(["from diffusers import DiffusionPipeline", "", load, call]) + seeded(sampler)
    if made.scheduler:
        return Made(f"a plain {its.pipeline.__name__} with {made.scheduler}, no code in it", use + WARNING)
    stock = (FILES / "student_pipeline.py").read_text(encoding="utf-8").replace("StableDiffusionPipeline", its.pipeline.__name__)
    (folder / "pipeline.py").write_text(stock, encoding="utf-8")
    use += f"\n\n`trust_remote_code` runs pipeline.py and scheduler/student_scheduler.py of this folder, because {made.why}: read them, they are short."
    return Made(f"a {its.pipeline.__name__} with a scheduler of its own, which wants trust_remote_code, because {made.why}", use)


def teacher_at(folder: Path, net: DiffusersDenoiser, named: str) -> Teacher:
    """UserError for a folder that is no pipeline, one with code of its own, or one where the student has no place."""
    other = "name the teacher's own with --pipeline FOLDER"
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} is no folder of a diffusers pipeline (no {INDEX} in it): {other}")
    its = Teacher(folder, json.loads((folder / INDEX).read_text(encoding="utf-8")), "", None, named)
    name, kind = its.index.get("_class_name"), type(net.model).__name__
    if not isinstance(name, str) or any((folder / part / f"{library}.py").exists() for part, (library, _) in its.components.items()):
        raise UserError(f"{folder} is a pipeline with code of its own, which an export does not copy: {other}")
    parts = [part for part, (_, its_kind) in its.components.items() if its_kind and class_now(folder / part, its_kind) == kind]
    if len(parts) != 1:
        raise UserError(f"{folder} has {len(parts)} parts of the class {kind}, wanted one that the student replaces: {other}")
    its.part, its.index[parts[0]] = parts[0], ["diffusers", kind]
    if kind == "UNet2DModel" and set(its.components) <= {its.part, "scheduler"}:
        name = PIXELS
    its.pipeline = getattr(diffusers(), name, None)
    if its.pipeline is None:
        raise UserError(f"{folder} is a {name}, which diffusers {diffusers().__version__} does not have: install one that has, or --to hub")
    wanted = {part for part, p in inspect.signature(its.pipeline.__init__).parameters.items() if p.default is p.empty and part != "self"}
    there = set(its.index) - {name for name, (library, _) in its.components.items() if name == "vae" and library is None}
    if missing := wanted - there:
        raise UserError(f"{folder} has no {', '.join(sorted(missing))}, which {name} is made of: {other}")
    return its


def copied(source: Path, goal: Path) -> None:
    """One component of the teacher, without weights in formats that run code or that nobody reads here."""
    if not source.is_dir():
        raise UserError(f"{source.parent} has no {source.name}/, which its {INDEX} names: an export wants the whole pipeline")
    shutil.copytree(source, goal, ignore=shutil.ignore_patterns(*OLD))
    lost = sorted(path.name for pattern in OLD for path in source.glob(pattern))
    if lost and not list(goal.glob("*.safetensors")):
        raise UserError(f"{source} has no weights as safetensors ({lost[0]} is not read): download the model as safetensors")


def write_scheduler(made: Plan, folder: Path) -> None:
    """scheduler_config.json; of our class with its file."""
    if made.scheduler:
        getattr(diffusers(), made.scheduler)(**made.config).save_pretrained(folder)
        return
    folder.mkdir()
    shutil.copyfile(FILES / "student_scheduler.py", folder / "student_scheduler.py")
    named = {"_class_name": "StudentScheduler", "_diffusers_version": diffusers().__version__}
    write_json(folder / "scheduler_config.json", named | made.config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_lora(net: DiffusersDenoiser, sampler: Sampler, made: Plan, its: Teacher, folder: Path, call: str) -> Made:
    """The adapters alone, as the pipeline's `load_lora_weights` reads them, or peft where it has none, and the scheduler."""
    state, config = folded(net.model)
    write_scheduler(made, folder / "scheduler")
    if hasattr(its.pipeline, "save_lora_weights"):
        layers = {f"{its.part}_lora_layers": state, f"{its.part}_lora_adapter_metadata": config.to_dict()}
        its.pipeline.save_lora_weights(folder, weight_name=LORA, safe_serialization=True, **layers)
        read, add = [], f'pipe.load_lora_weights({HERE}, weight_name="{LORA}")'
    else:
        config.save_pretrained(folder)
        tensors = {f"base_model.model.{name}": t for name, t in state.items()}
        save_tensors(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        read, add = ["from peft import PeftModel"], f"pipe.{its.part} = PeftModel.from_pretrained(pipe.{its.part}, {HERE})"
    pipeline = "DiffusionPipeline" if its.pipeline.__name__ == its.index["_class_name"] else its.pipeline.__name__
    lines = [f"from diffusers import {', '.join(sorted({pipeline, made.scheduler}))}", *read, ""]
    lines += [f"pipe = {pipeline}.from_pretrained({its.named!r})  # the teacher"]
    lines += [f'pipe.scheduler = {made.scheduler}.from_pretrained({HERE}, subfolder="scheduler")  # this folder', add, call]
    return Made(f"adapters (LoRA) for {its.named}, with {made.scheduler}", snippet(lines) + seeded(sampler) + WARNING)


def folded(model: Any) -> tuple[dict[str, Tensor], Any]:
    """The adapters' tensors with alpha/rank multiplied into B, and peft's settings of them, whose alpha is the rank.

    diffusers takes alpha for the rank, without a word, where a file's metadata do not say otherwise, and other programs read no metadata: so
    that it is the same for all of them, and in the metadata as well.
    """
    from peft import get_peft_model_state_dict

    state = {name: t.detach().cpu().contiguous() for name, t in get_peft_model_state_dict(model).items()}
    for name in state:
        layer, found, _ = name.partition(".lora_B.")
        if found:
            state[name] = state[name] * model.get_submodule(layer).scaling["default"]
    config = copy.deepcopy(model.peft_config["default"])
    config.lora_alpha, config.alpha_pattern, config.use_rslora, config.inference_mode = config.r, dict(config.rank_pattern), False, True
    return state, config


# The call


def call_of(net: DiffusersDenoiser, made: Plan, its: Teacher, prompt: str) -> str:
    """The line of Python with the very arguments that give the student's images."""
    accepts = inspect.signature(its.pipeline.__call__).parameters
    given: dict[str, Any] = {}
    if net.text:
        given["prompt"] = prompt
    elif net.label_dim:
        given["class_labels"] = list(range(min(net.label_dim, 4)))
    if "batch_size" in accepts:
        given["batch_size"] = len(given.get("class_labels", range(4)))
    given |= made.call
    if "guidance" in net.fixed:  # a number that the net is told
        given["guidance_scale"] = net.fixed["guidance"]
    elif "guidance_scale" in accepts and accepts["guidance_scale"].default is not None:
        given["guidance_scale"] = 0.0  # none: the student has its teacher's inside
    if "true_cfg_scale" in accepts and accepts["true_cfg_scale"].default != 1:
        given["true_cfg_scale"] = 1.0
    if "use_resolution_binning" in accepts:
        given["use_resolution_binning"] = False
    if "height" in accepts:
        given |= sizes(net, its)
    result = "frames" if "num_frames" in accepts else "images"
    return f"{result} = pipe({', '.join(f'{name}={value!r}' for name, value in given.items())}).{result}"


def sizes(net: DiffusersDenoiser, its: Teacher) -> dict[str, int]:
    """height, width and num_frames of what the student makes, by the pipeline's own factors; its VAE is built without memory."""
    vae = getattr(diffusers(), str(its.components["vae"][1]))
    with torch.device("meta"):
        parts = dict.fromkeys(its.components) | {"vae": vae.from_config(vae.load_config(its.folder / "vae"))}
    pipe = its.pipeline(**parts | ({"requires_safety_checker": False} if "safety_checker" in parts else {}))
    factor = getattr(pipe, "vae_scale_factor", None) or pipe.vae_scale_factor_spatial
    channels = pipe.vae.config.get("latent_channels") or pipe.vae.config.get("z_dim")
    factor *= 2 if net.shape[0] == 4 * channels else 1  # FLUX.2's net knows latents of which 2×2 are one
    *frames, height, width = net.shape[1:]
    found = {"height": height * factor, "width": width * factor}
    return found | ({"num_frames": (frames[0] - 1) * pipe.vae_scale_factor_temporal + 1} if frames else {})


def seeded(sampler: Sampler) -> str:
    return SEED if sampler.solver in (RENOISE, ANCESTRAL) and len(sampler.sigmas) > 1 else ""


def snippet(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])
