"""Pipelines whose files name things as those do that people download: SD 1.5's safety checker, DiT's and PixArt's former class, DDPM's folder.

What runs here is tiny and random; what model_index.json and config.json say is what these releases say.
"""

import json
import re
import shutil

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
import diffusers_pipelines
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from potstill.engine.export import main as export
from potstill.engine.models.origins import lacking
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.train import main as train

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:(?!potstill)", "ignore::FutureWarning:(?!potstill)",
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers",
)  # fmt: skip
LEGACY = {"attention_type": "default", "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False}


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def released(kind, folder):
    """A tiny pipeline as its release is laid out."""
    diffusers_pipelines.folder(kind, folder)
    if kind == "unet":  # all in one folder, and attention's layers called as in the first version
        weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        rename = re.compile(rf"attentions\.\d+\.({'|'.join(map(re.escape, old))})\.")
        named = {rename.sub(lambda m: m[0].replace(m[1], old[m[1]]), name): tensor for name, tensor in weights.items()}
        assert any("query" in name for name in named)
        save_file(named, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        for path in ("unet/config.json", "scheduler/scheduler_config.json"):
            (folder / path).rename(folder / path.partition("/")[2])
        shutil.rmtree(folder / "unet")
        shutil.rmtree(folder / "scheduler")
        return folder
    if kind != "sd15":
        edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
        edit(folder / "transformer/config.json", _class_name="Transformer2DModel", **LEGACY)
        return folder
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(crop_size=16, size=16).save_pretrained(folder / "feature_extractor")
    parts = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    edit(folder / "model_index.json", requires_safety_checker=True, **parts)
    return folder


@pytest.mark.parametrize("kind", ["sd15", "dit", "pixart", "unet"])
def test_a_run_and_its_export(kind, tmp_path):
    teacher = released(kind, tmp_path / kind)
    assert lacking(teacher) is None
    recipe = diffusers_pipelines.write_recipe(tmp_path, "steps: [999], start: unit", "kimg: 0.012")
    run, told = tmp_path / "run", [] if kind in ("dit", "unet") else [f"text.prompts={tmp_path}/prompts.txt"]
    train([str(recipe), f"run_dir={run}", f"teacher.checkpoint={teacher}", *told])
    export([str(run), "--to", "diffusers", "--out", str(tmp_path / "out")])
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    own = diffusers.DiffusionPipeline.from_pretrained(teacher)
    assert {name: type(part) for name, part in pipe.components.items() if name != "scheduler"} == {
        name: type(part) for name, part in own.components.items() if name != "scheduler"
    }
    part = "unet" if kind in ("sd15", "unet") else "transformer"
    mine = DiffusersDenoiser.from_folder(teacher).model
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), getattr(own, part).state_dict().values(), strict=True))
    assert any((a - b).any() for a, b in zip(getattr(pipe, part).state_dict().values(), mine.state_dict().values(), strict=True))


def test_a_part_that_nobody_reads_may_be_of_any_class(tmp_path):
    """Community's checkpoints name CLIPFeatureExtractor, which transformers 5 has no more."""
    teacher = released("sd15", tmp_path / "sd15")
    edit(teacher / "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    (tmp_path / "prompts.txt").write_text("a cat\n")
    words = [f"run_dir={tmp_path}/run", f"teacher.checkpoint={teacher}", f"text.prompts={tmp_path}/prompts.txt", "--dry-run"]
    train(["sid_lsg_sd15", "teacher.size=null", *words])


def test_an_index_that_names_no_class_lacks_nothing_of_it(tmp_path):
    """Whoever reads the part says what is wrong with it."""
    teacher = released("dit", tmp_path / "dit")
    for value in ([["diffusers"], "X"], [{}, {}], [None, None], ["diffusers", 1], "diffusers", ["diffusers"], 7):
        edit(teacher / "model_index.json", vae=value)
        assert lacking(teacher) is None
