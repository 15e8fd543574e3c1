"""Pipelines of diffusers that are opened after their run, from elsewhere, or from the hub's cache; and nothing that is half there.

Pipelines are tiny, random and made here (diffusers_pipelines.py). The hub is its cache and a stand-in for its downloads.
"""

import json
import shutil
import tempfile
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")

import diffusers
import diffusers_pipelines
import torch
from diffusers_pipelines import WORDS
from safetensors.torch import load_file, save_file

from potstill.__main__ import main as potstill
from potstill.engine.common.errors import UserError
from potstill.engine.export import main as export
from potstill.engine.formats.pictures import layout, save_png, side_by_side
from potstill.engine.jobs.finish import Gallery
from potstill.engine.models import origins
from potstill.engine.models.student import Student
from potstill.engine.models.weights import read_metadata, save_net
from potstill.engine.nets.conditions import Text
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.train import main as train

# What libraries warn of while they import one another, and of where they are put together here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!potstill)", "ignore::FutureWarning:(?!potstill)"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"),
]


# The hub's cache


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(pipeline, *left_out): the snapshot of me/sd in a cache of its own, without some files. No request gets anywhere."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    origins._snapshot.cache_clear()

    def filled(pipeline, *left_out):
        (cache / "models--me--sd/refs").mkdir(parents=True)
        (cache / "models--me--sd/refs/main").write_text("abc")
        snapshot = shutil.copytree(pipeline, cache / "models--me--sd/snapshots/abc")
        for pattern in left_out:
            for path in list(snapshot.glob(pattern)):
                path.unlink()
        return snapshot

    yield filled
    origins._snapshot.cache_clear()


def sharded(folder, part="unet"):
    """The same pipeline with a part in several shards, as diffusers cuts it."""
    kind = getattr(diffusers, json.loads((folder / "model_index.json").read_text())[part][1])
    net = kind.from_pretrained(folder / part)
    shutil.rmtree(folder / part)
    net.save_pretrained(folder / part, max_shard_size="20KB")
    assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1
    return folder


HALVES = {
    "the index alone": (["[!m]*/*", "[!m]*/*/*"], "scheduler/scheduler_config.json"),
    "no weights of the denoiser": (["unet/*.safetensors"], "unet/diffusion_pytorch_model.safetensors"),
    "no encoder": (["text_encoder/*"], "text_encoder/config.json"),
    "no words": (["tokenizer/tokenizer.json"], "tokenizer/tokenizer.json"),
    "no settings of the scheduler": (["scheduler/*"], "scheduler/scheduler_config.json"),
    "no VAE": (["vae/diffusion*"], "vae/diffusion_pytorch_model.safetensors"),
    "one shard too few": (["unet/*-00002-of-*"], "unet/diffusion_pytorch_model-00002-of-"),
    "shards without an index": (["unet/*.index.json"], "unet/diffusion_pytorch_model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", HALVES)
def test_half_a_download_goes_on(case, hub, pipelines, tmp_path, monkeypatch):
    """The rest comes in the stand-in of a download; without one the sentence says what is not there."""
    left_out, missing = HALVES[case]
    whole = shutil.copytree(pipelines("sd15"), tmp_path / "whole")
    whole = sharded(whole) if "shard" in case else whole
    snapshot = hub(whole, *left_out)
    assert not origins.is_there("me/sd") and origins.to_come("me/sd")
    with pytest.raises(UserError, match="is not whole in the hub's cache") as refused:
        origins.fetched("me/sd")
    assert f"lacks {missing}" in str(refused.value) and "\n" not in str(refused.value)

    def download(name, **how):
        assert name == "me/sd" and how["use_safetensors"]
        shutil.copytree(whole, snapshot, dirs_exist_ok=True)
        return snapshot

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    assert origins.fetched("me/sd") == snapshot and origins.is_there("me/sd") and not origins.to_come("me/sd")


@pytest.mark.parametrize("kind", diffusers_pipelines.PIPELINES)
def test_a_whole_snapshot_asks_for_nothing(kind, hub, pipelines, monkeypatch):
    snapshot = hub(pipelines(kind))
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda *_, **__: pytest.fail("a request"))
    assert origins.is_there("me/sd") and not origins.to_come("me/sd")
    assert origins.fetched("me/sd") == origins.local_path("me/sd") == snapshot


def test_a_whole_snapshot_of_shards_with_other_precisions(hub, pipelines, tmp_path):
    whole = sharded(shutil.copytree(pipelines("sd15"), tmp_path / "whole"))
    (whole / "unet/diffusion_pytorch_model.fp16.safetensors.index.json").write_text('{"weight_map": {"a": "none.safetensors"}}')
    hub(whole)
    assert origins.is_there("me/sd")


# Finished runs


@pytest.fixture(scope="module")
def place(tmp_path_factory, pipelines):
    """Where all runs here are trained: a recipe, prompts, and the teachers, which the runs name by relative paths."""
    folder = tmp_path_factory.mktemp("place")
    diffusers_pipelines.write_recipe(folder, train="kimg: 0.008, grid_kimg: 0.008, checkpoint_kimg: 0.004")
    return folder


KINDS = {
    "sd15": ["method.guidance=2"], "lora": ["lora.rank=2"], "dit": [], "flux": ["method.start=unit", "teacher.embedded_guidance=2"],
    "unet": [], "several": ["students.count=2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(place, pipelines):
    """Folders of finished runs by kind, and what each showed of its nets: {"teacher": images, "student": images}, uint8."""

    @cache
    def made(kind):
        teacher, shown, samples = {"lora": "sd15", "several": "dit"}.get(kind, kind), [], Gallery.samples
        if not (place / teacher).exists():
            shutil.copytree(pipelines(teacher), place / teacher)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            patch.setattr(Gallery, "whole_rows", lambda *_: 10)
            patch.setattr(Gallery, "samples", lambda *arguments: shown.append(samples(*arguments)) or shown[-1])
            prompts = [] if teacher in ("dit", "unet") else ["text.prompts=prompts.txt", "text.precision=fp32"]
            train(["tiny.yaml", f"run_dir=runs/{kind}", f"teacher.checkpoint={teacher}", *prompts, *KINDS[kind]])
        teacher, student = (images.permute(0, 2, 3, 1).numpy().astype(int) for images in shown[-2:])  # in the order of summary's nets
        return place / "runs" / kind, {"teacher": teacher, "student": student}

    return made


def sampled(folder, *more, seeds="0-9"):
    """Images [n, H, W, C] of the command."""
    with tempfile.TemporaryDirectory() as away:
        potstill(["sample", str(folder), "--seeds", seeds, "--device", "cpu", "--out", f"{away}/x.npz", *map(str, more)])
        return np.load(f"{away}/x.npz")["images"].astype(int)


def refused(capsys, *arguments):
    """The one sentence that the command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        potstill([str(one) for one in arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_opened_from_any_folder_with_its_teacher(kind, finished, tmp_path, monkeypatch):
    """The images are those that the run itself drew of both nets, from the same noise and prompts."""
    folder, shown = finished(kind)
    monkeypatch.chdir(tmp_path)
    for role in ("student", "teacher"):
        images = sampled(folder, "--which", role)
        assert images.shape == shown[role].shape and abs(images - shown[role]).max() <= 1, role
    assert abs(sampled(folder, "--teacher", seeds="3") - shown["teacher"][3]).max() > 1 or "text" not in {
        path.name for path in folder.iterdir()
    }  # another prompt
    evaluations = 2 if kind == "flux" else 3  # Heun takes one from pure noise
    out, titles = tmp_path / "pair.png", {"student": "student, 1 evaluation", "teacher": f"teacher, {evaluations} evaluations"}
    potstill(["sample", str(folder), "--beside", "--seeds", "0-9", "--device", "cpu", "--out", str(out)])
    how = layout(np.arange(10) % 4 if kind in ("dit", "several") else None, 10)
    wanted = {title: how.draw(shown[role].astype(np.uint8).transpose(0, 3, 1, 2)) for role, title in titles.items()}
    save_png(side_by_side(wanted), tmp_path / "wanted.png")
    found, drawn = (np.asarray(Image.open(path)).astype(int) for path in (out, tmp_path / "wanted.png"))
    assert found.shape == drawn.shape and abs(found - drawn).max() <= 1


def test_a_run_from_before_opens_where_it_was_trained(place, finished, tmp_path, monkeypatch, capsys):
    folder, shown = finished("sd15")
    old = shutil.copytree(folder, tmp_path / "old")
    (old / "place.json").unlink()
    monkeypatch.chdir(place)
    assert abs(sampled(old) - shown["student"]).max() <= 1
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, "sample", old, "--prompts", "a", "--out", "x.png")
    assert (
        "wants the pipeline of its teacher for its prompts and VAE, sd15, which is not there: put it back, or name its folder with" in said
    )


@pytest.mark.parametrize("kind", ["sd15", "lora"])
def test_a_teacher_that_was_moved_is_named(kind, place, finished, tmp_path, capsys):
    folder, shown = finished(kind)
    (tmp_path / "place").mkdir()
    old = shutil.copytree(folder, tmp_path / "place/run")
    (old / "place.json").write_text(json.dumps({"folder": str(tmp_path / "nowhere")}))
    meta = read_metadata(old / "student.safetensors")
    if kind == "lora":
        meta["lora"]["base"]["source"] = "/nowhere/sd15"
        save_file(
            load_file(old / "student.safetensors"), old / "part", {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()}
        )
        (old / "part").rename(old / "student.safetensors")
    told = ("--prompts", str(place / "prompts.txt"))
    moved = shutil.copytree(place / "sd15", tmp_path / "moved")
    assert "--pipeline" in refused(capsys, "sample", old, *told, "--out", "x.png")
    assert "--pipeline" in refused(capsys, "evaluate", old, "--data", "digits")
    for more, role in {(): "student", ("--teacher",): "teacher"}.items():
        assert abs(sampled(old, *told, "--pipeline", moved, *more) - shown[role]).max() <= 1
    seeds, words = range(10), [WORDS[i % 7] for i in range(10)]
    student = Student.from_pretrained(old, pipeline=moved)
    images = student(seeds=seeds, prompts=words).permute(0, 2, 3, 1).numpy().astype(int)
    assert abs(images - shown["student"]).max() <= 1
    assert "no pipeline at" in refused(capsys, "sample", old, "--pipeline", tmp_path, "--out", "x.png")
    assert "is no net of diffusers" in refused(capsys, "sample", edm(tmp_path), "--pipeline", moved, "--out", "x.png")
    weights = moved / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    if kind == "lora":
        assert "holds adapters (LoRA) of the weights" in refused(capsys, "sample", old, *told, "--pipeline", moved, "--out", "x.png")
        with pytest.raises(UserError, match="holds adapters"):
            Student.from_pretrained(old, pipeline=moved)


def test_a_teacher_that_changed_is_not_shown_as_the_runs(place, finished, tmp_path, capsys):
    run = shutil.copytree(finished("sd15")[0], tmp_path / "run")
    teacher = shutil.copytree(place / "sd15", tmp_path / "sd15")
    (run / "place.json").write_text(json.dumps({"folder": str(tmp_path)}))
    told = ("--prompts", "a cat", "--seeds", "0", "--out", str(tmp_path / "x.png"))
    potstill(["sample", str(run), "--beside", *told])
    scheduler = teacher / "scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.00085", "0.00095").replace("0.0001,", "0.0002,"))
    for how in ("--teacher", "--beside"):
        assert "is another pipeline than the one that" in refused(capsys, "sample", run, how, *told)
    (run / "place.json").write_text("[]")
    assert "place.json holds a list" in refused(capsys, "sample", run, *told)


def edm(folder):
    net = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1,
                      attn_resolutions=[])  # fmt: skip
    save_net(folder / "edm.safetensors", net, kimg=1.0)
    return folder / "edm.safetensors"


def test_a_pipeline_alone_is_a_teacher_without_guidance(place, finished, capsys):
    """The run of adapters showed the same net, unguided and with as many steps."""
    _, shown = finished("lora")
    told = ("--prompts", place / "prompts.txt", "--steps", 2)
    assert abs(sampled(place / "sd15", *told) - shown["teacher"]).max() <= 1
    assert abs(sampled(finished("sd15")[0], "--teacher", "--steps", 2) - finished("sd15")[1]["teacher"]).max() <= 1  # still guided
    assert "does not say which prompts its nets are told: give some with --prompts" in refused(
        capsys, "sample", place / "sd15", "--out", "x.png"
    )
    assert "--which" not in refused(capsys, "sample", place / "sd15", "--which", "student", "--out", "x.png")


# Measured


@pytest.fixture(scope="module")
def latents(place, pipelines):
    """Of 12 pictures 64 x 64, with a caption for each, beside the teacher of the runs."""
    if not (place / "sd15").exists():
        shutil.copytree(pipelines("sd15"), place / "sd15")
    (place / "captions.txt").write_text("\n".join(f"{WORDS[i % 7]} {i}" for i in range(12)))
    (place / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    for i, image in enumerate(noise):
        Image.fromarray(image).save(place / f"pictures/{i:02}.png")
    told = ["--captions", str(place / "captions.txt"), "--pipeline", str(place / "sd15"), "--device", "cpu"]
    potstill(["convert", "latents", str(place / "pictures"), str(place / "latents"), *told])
    return place / "latents"


def test_both_nets_are_measured_as_the_run_did(place, latents, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(Gallery, "count", 10)
    more = ["method.gan=true", "data.path=latents", "eval.batch=8", "text.precision=fp32"]
    train(["tiny.yaml", "run_dir=runs/on", "teacher.checkpoint=sd15", "text.prompts=prompts.txt", *more])
    summary = json.loads((place / "runs/on/summary.json").read_text())
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    potstill(["evaluate", str(place / "runs/on"), "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    assert found["student"]["fd"] == pytest.approx(summary["student"]["fd"], rel=1e-4)
    assert found["teacher"]["fd"] == pytest.approx(summary["teacher"]["fd"], rel=1e-4)
    potstill(["evaluate", str(place / "sd15"), "--data", str(latents), "--steps", "2", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out)["teacher"]["fd"] == pytest.approx(summary["teacher"]["fd"], rel=1e-4)
    said = refused(capsys, "evaluate", place / "runs/on", "--data", place / "pictures")
    assert f"potstill convert latents {place}/pictures OUT --pipeline {place}/sd15 makes" in said and "convert images" not in said
    assert "name it, or leave --pipeline out" in refused(
        capsys, "evaluate", "--data", "digits", "--save-reference", tmp_path / "a.npz", "--pipeline", place / "sd15"
    )


# In Python


def test_a_student_takes_prompts(place, finished):
    """Embedded and decoded by plain diffusers the picture is the same."""
    folder, _ = finished("sd15")
    student = Student.from_pretrained(folder)
    assert student.pipeline == place / "sd15"
    images = student(seeds=[5, 6], prompts=["a cat", "snow"], dtype=torch.float32)
    pipe = diffusers.DiffusionPipeline.from_pretrained(place / "sd15", safety_checker=None)  # pyright: ignore[reportPrivateImportUsage]
    embeds, _ = pipe.encode_prompt(["a cat", "snow"], "cpu", 1, False)
    z = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    with torch.no_grad():
        wanted = pipe.vae.decode(student.generate(z, Text(embeds)) / pipe.vae.config.scaling_factor).sample
        assert torch.equal(student.generate(z, student.encode(["a cat", "snow"])), student.generate(z, Text(embeds)))
    assert (images - wanted).abs().max() <= 1e-4 and (images[0] - images[1]).abs().max() > 1e-3
    assert torch.equal(student(seeds=[5, 6], prompts=Text(embeds), dtype=torch.float32), images)
    assert student(seeds=[], prompts=[]).shape[0] == 0


def test_what_a_student_of_prompts_wants_is_said(finished, tmp_path):
    student = Student.from_pretrained(finished("sd15")[0])
    lone = tmp_path / "lone.safetensors"
    shutil.copyfile(finished("sd15")[0] / "student.safetensors", lone)
    for words, call in {
        r'is told prompts, got none: student\(seeds=\[0, 1\], prompts=\["a cat", "a dog"\]\)': lambda: student(seeds=[0, 1]),
        "one prompt for each of 2 seeds, got 1": lambda: student(seeds=[0, 1], prompts="ab"),
        "one prompt for each of 2 seeds, got 3": lambda: student(seeds=[0, 1], prompts=["a"] * 3),
        "knows no classes, got labels": lambda: student(seeds=[0], labels=[1]),
        "prompts alone: leave labels out": lambda: student(seeds=[0], labels=[1], prompts=["a"]),
        r"student.generate\(z, student.encode": lambda: student.generate(torch.zeros(1, 4, 8, 8)),
        "wanted a list of prompts": lambda: student.encode("a"),
        r"from_pretrained\(…, pipeline=FOLDER\)": lambda: Student.from_pretrained(lone)(seeds=[0], prompts=["a"]),
        "is told no prompts: leave them out": lambda: Student.from_pretrained(finished("dit")[0])(seeds=[0], prompts=["a"]),
    }.items():
        with pytest.raises(UserError, match=words):
            call()


@pytest.mark.parametrize("kind", ["sd15", "dit", "unet"])
def test_the_lines_of_a_model_card_run(kind, place, finished, tmp_path, monkeypatch):
    folder, _ = finished(kind)
    for to in ("safetensors", "hub"):
        export([str(folder), "--to", to, "--out", str(tmp_path / to)])
        code = (tmp_path / to / "README.md").read_text().split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(tmp_path / to)
        names: dict[str, Any] = {"FOLDER": str(place / kind)}
        exec(code, names)
        side = 8 if kind == "unet" else 64
        assert names["images"].shape == (16, 3, side, side) and names["x"].shape[0] == 16
