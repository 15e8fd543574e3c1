"""Every recipe whose teacher is a pipeline of diffusers, run to its end on a tiny one of the same class: two iterations of two images.

Only files and sizes are replaced. The nets are random, so what is trained means nothing; what it is trained at is looked at: the
students' noise levels are compared with diffusers' own tables of alphas, or with t / (1 - t) of flows.
"""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers_models
import diffusers_pipelines
import numpy as np

from potstill.engine import convert, train
from potstill.engine.common.reading import read_json
from potstill.engine.config.library import find, groups_of, names, text_of
from potstill.engine.config.tree import load
from potstill.engine.jobs.finish import Gallery
from potstill.engine.models.weights import read_tensors

RECIPES = [name for name in names() if "net" not in groups_of(find(name))]
RECIPES.sort(key=lambda name: "runs/" in text_of(find(name)))  # after the recipe that they go on from
KINDS = {"sd15": "sd15", "sdxl": "sdxl", "pixart512": "pixart", "sd35_medium": "sd3", "flux_dev": "flux"}  # by the group teacher
SIZES = {"flux": [8, 8]}  # of the latents, where a pipeline does not say it
#: Where a student begins and passes: timesteps of the table, of flows too (t = (1 + timestep) / 1000).
STEPS = {
    "sid_lsg_sd15": [625], "dmd2_sd15": [999], "dmd2_sd15_gan": [999], "dmd2_sdxl": [399], "dmd2_sdxl_4": [999, 749, 499, 249],
    "dmd2_sdxl_lora": [999, 749, 499, 249], "sim_pixart512": [440], "sid_dit_sd35": [999, 749, 499, 249],
    "dmd2_flux_lora": [999, 749, 499, 249],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny pipelines, latents of pictures with captions, prompts; runs by the recipes' names."""
    folder = tmp_path_factory.mktemp("recipes")
    for kind in KINDS.values():
        diffusers_pipelines.folder(kind, folder / kind)
    (folder / "prompts.txt").write_text("a cat\na dog\ntwo birds\na red house\n")
    np.savez(folder / "pictures.npz", images=torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8).numpy())
    for kind in ("sd15", "sdxl"):
        diffusers_pipelines.scaled(folder / kind, 4.0)
        words = ["--pipeline", str(folder / kind), "--captions", str(folder / "prompts.txt"), "--device", "cpu"]
        convert.main(["latents", str(folder / "pictures.npz"), str(folder / f"{kind}-latents"), *words])
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_on_a_tiny_pipeline_of_its_class(name, place, monkeypatch, capfd):
    monkeypatch.setattr(Gallery, "count", 2)
    cfg, kind = load(name, []), KINDS[groups_of(find(name))["teacher"]]
    changes = [
        f"teacher.checkpoint={place / kind}",
        f"teacher.size={SIZES.get(kind, 'null')}",
        f"run_dir={place / 'runs' / name}",
        "device=cpu",
    ]
    changes += ["train.batch=2", "train.micro_batch=null", "train.kimg=0.004", "teacher.loss.sampling_steps=2"]
    changes += ["text.max_length=16"] if kind in ("pixart", "sd3", "flux") else []  # those of CLIP's alone have as many anyway
    changes += ["eval.n=2", "eval.batch=2"] if cfg.data.path else []
    changes += [f"text.prompts={place / 'prompts.txt'}"] if cfg.text.prompts else []
    changes += [f"data.path={place / kind}-latents"] if cfg.data.path else []
    changes += [f"students.start={place / cfg.students.start}"] if cfg.students.start else []
    train.main([name, *changes])
    assert "do nothing" not in capfd.readouterr().err
    run = place / "runs" / name
    assert read_json(run / "summary.json", dict, "")["images_seen"]["student"] == 4
    tensors, about = read_tensors(run / "student.safetensors")
    assert all("lora_" in tensor for tensor in tensors) == bool(cfg.lora.rank)
    if name in STEPS:
        assert about["sampler"]["sigmas"] == pytest.approx(levels(kind, STEPS[name]), rel=1e-5)
        assert about["sampler"].get("start", "sigma") == ("sigma" if type(cfg.method).name == "sim" and not cfg.method.steps else "unit")
    else:
        assert len(about["sampler"]["sigmas"]) == 8


def levels(kind: str, steps: list[int]) -> list[float]:
    """σ by diffusers' table, or of a flow's even times; the cap for a flow's pure noise."""
    scheduler = diffusers_models.scheduler(kind)
    if not hasattr(scheduler, "alphas_cumprod"):
        return [1e5 if step == 999 else (step + 1) / (999 - step) for step in steps]
    alphas = scheduler.alphas_cumprod.double()[steps]
    return ((1 - alphas) / alphas).sqrt().tolist()


def test_every_recipe_for_pipelines_has_its_levels_looked_at():
    assert set(STEPS) | {"mm_t2i8"} == set(RECIPES)
