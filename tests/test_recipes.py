"""Every recipe that is shipped, run to its end: cut off in the middle, gone on with, and started again when it is done.

A recipe is scaled down, and everything else is its own. Of every stage: `ITERATIONS` iterations in place of all, and whatever
is counted in images or iterations (intervals, half-lives, warm-ups, R1) shrinks by the same factor; the batch is two
micro-batches of two images where it is cut in micro-batches, else four. Images are of 8x8, nets have one level, one block and
8 channels, GANs' projectors 8; ImageNet has 8 classes, and two students share what four do; the teacher's samples take three steps.

What cannot be had here has a stand-in: data are synthetic images with the data's classes, teachers of which a recipe names a file
are new nets of its shape, Inception is a TorchScript module of a few numbers, timm's feature nets are TorchScript modules
with as many maps, LPIPS is the squared difference. What another recipe leaves behind is really made by that one.
"""

import copy
import dataclasses
import functools
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from potstill.engine.config.library import find, groups_of, names, text_of
from potstill.engine.config.schema import Config
from potstill.engine.config.tree import load
from potstill.engine.data import scenes
from potstill.engine.jobs import build
from potstill.engine.jobs.finish import Gallery
from potstill.engine.jobs.job import Job
from potstill.engine.models.weights import load_net, read_tensors, save_net
from potstill.engine.training.loop import Interrupted
from potstill.engine.training.run import Run, TrainConfig

# Those with nets of ours (test_recipes_diffusers has the others); those that want what another recipe leaves behind come last.
RECIPES = [name for name in names() if "net" in groups_of(find(name))]
RECIPES = sorted(RECIPES, key=lambda name: ("runs/" in text_of(find(name)).partition("defaults:")[2], name))
ITERATIONS, IMAGES = 2, 20
CLASSES = {"cifar10": 10, "imagenet64": 8, "fast32": 10, "fast64": 10}  # of the data; AFHQv2 and FFHQ have none


class Seen(nn.Module):
    """In Inception's place: the means of the four quarters of an image, by colour."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 255


class Maps(nn.Module):
    """In the place of a net that was pretrained on ImageNet: four maps, each half as wide as the one before."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = nn.functional.interpolate(x, size=(16, 16))
        pool = nn.functional.avg_pool2d
        return x, pool(x, 2), pool(x, 4), pool(x, 8)


class SquaredDifference(nn.Module):
    """In the place of lpips.LPIPS."""

    def __init__(self, net: str, verbose: bool):
        super().__init__()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3), keepdim=True)


@dataclasses.dataclass
class Place:
    """Where the recipes run, and what was made for them."""

    folder: Path
    inception: str
    maps: str

    def ran(self, name: str) -> Path:
        """The run folder of a recipe that has been run to its end."""
        folder = self.folder / name
        if not (folder / "summary.json").exists():
            Job(self.small(name)).run()
        return folder

    def small(self, name: str) -> Config:
        """The recipe, scaled down, with stand-ins."""
        cfg = copy.deepcopy(settings(name))
        cfg.run_dir = str(self.folder / name)
        data = name.partition("_")[0]
        for net in filter(None, (cfg.net, cfg.students.net)):
            if net.config:  # of a class of diffusers
                net.config |= {"num_attention_heads": 1, "attention_head_dim": 8} if net is cfg.net else {}
                net.config["num_layers"] = 2 if net is cfg.net else 1
                continue
            net.model_channels = 8 if net is cfg.net else 4
            net.num_blocks, net.channel_mult, net.attn_resolutions = 1, [1], []
        if cfg.data.path not in ("digits", "scenes"):
            channels, classes = cfg.data.channels or 3, CLASSES.get(data, 0)
            cfg.data.path, cfg.data.resolution = f"synthetic:8x{channels}x{classes}x{IMAGES}", 8
            cfg.eval.features, cfg.teacher.vae = self.inception if channels == 3 else "pixels", None  # latents: of themselves
        cfg.eval.n, cfg.eval.batch = IMAGES, IMAGES
        cfg.students.count = min(cfg.students.count, 2)
        share = ITERATIONS / iterations(cfg.train)
        cfg.teacher.loss.sampling_steps = 3
        for stage in (cfg.teacher.train, cfg.students.tsm, cfg.train):
            shorten(stage)
        method = cfg.method
        for count in ("r1_every", "measure_every"):
            if hasattr(method, count):
                setattr(method, count, max(1, round(share * getattr(method, count))))
        for kimg in ("student_after", "gan_after"):  # of SiDA: else its student would not move in so short a run
            if hasattr(method, kimg):
                setattr(method, kimg, 0.0)
        if getattr(method, "regression", 0):
            method.pairs, method.pair_steps = IMAGES, 3
        if hasattr(method, "features"):
            method.width = 8
            method.features = [self.maps if one.startswith("timm:") else one for one in method.features]
        if cfg.students.start:
            cfg.students.start = str(self.ran(Path(cfg.students.start).name))
        if cfg.teacher.checkpoint:
            cfg.teacher.checkpoint = str(self.teacher(cfg))
        return cfg

    def teacher(self, cfg: Config) -> Path:
        """The weight file that a recipe names: what another recipe made, or in place of a published one a new net."""
        named = Path(cfg.teacher.checkpoint)
        if named.parts[0] == "runs":
            return self.ran(named.parts[1]) / Path(*named.parts[2:])
        path = self.folder / named.name
        if not path.exists():
            images = build.build_images(cfg)
            save_net(path, build.build_net(cfg.net, images.resolution, images.channels, images.label_dim), kimg=1.0)
        return path


@functools.cache
def settings(name: str) -> Config:
    return load(name, [])


def iterations(stage: TrainConfig) -> float:
    return stage.kimg * 1000 / stage.batch


def shorten(stage: TrainConfig) -> None:
    """A stage of ITERATIONS iterations of a small batch, with its intervals in proportion."""
    share = ITERATIONS / iterations(stage)
    parts = 2 if stage.micro_batch else 1
    batch, kimg = 4, stage.kimg
    stage.batch, stage.micro_batch = batch, batch // parts if stage.micro_batch else None
    stage.kimg = ITERATIONS * batch / 1000
    for interval in ("ema_kimg", "grid_kimg", "eval_kimg", "checkpoint_kimg"):
        if getattr(stage, interval) is not None:
            setattr(stage, interval, getattr(stage, interval) * stage.kimg / kimg)
    stage.log_iterations = max(1, round(stage.log_iterations * share))
    for optim in stage.optim.values():
        optim.warmup = round(optim.warmup * share)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Seen()).save(folder / "seen.pt")
        torch.jit.script(Maps()).save(folder / "maps.pt")
    lpips = ModuleType("lpips")
    lpips.LPIPS, lpips.__spec__ = SquaredDifference, object()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lpips", lpips)
        drawn = scenes.drawn_scenes
        patch.setattr(scenes, "drawn_scenes", lambda n=IMAGES, **how: drawn(n, **how))
        yield Place(folder, str(folder / "seen.pt"), f"torchscript:{folder / 'maps.pt'}")


def cut_off(monkeypatch, stage: int) -> None:
    """The first call from now on is interrupted in the middle of that stage, counted from 0."""
    begun, take = [], Run.take

    def take_and_stop(run: Run, *batch) -> None:
        take(run, *batch)
        if run not in begun:
            begun.append(run)
        if len(begun) == stage + 1 and run.step == run.total // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "take", take_and_stop)
    monkeypatch.setattr(Gallery, "count", IMAGES)


def stages(cfg: Config) -> list[Path]:
    """The folders of a run's stages, in turn."""
    run, count = Path(cfg.run_dir), cfg.students.count
    first = ([] if cfg.teacher.checkpoint else [run / "teacher"]) + ([run / "tsm"] if cfg.students.net else [])
    return first + ([run / f"student-{k}" for k in range(count)] if count > 1 else [run])


def lines(stage: Path) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, tuple]:
    """What is in every weight file of a run, and what it says about itself."""
    found = {path: read_tensors(path) for path in folder.rglob("*.safetensors")}
    return {str(path): (about, {name: t.double().sum().item() for name, t in tensors.items()}) for path, (tensors, about) in found.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_to_its_end(recipe, place, monkeypatch):
    if "captions" in groups_of(find(recipe)).values():
        pytest.importorskip("diffusers")
    cfg = place.small(recipe)
    folder = Path(cfg.run_dir)
    cut_off(monkeypatch, len(stages(cfg)) // 2)
    with pytest.raises(Interrupted, match="the same command goes on from there"):
        Job(cfg).run()
    summary = Job(cfg).run()
    assert summary["images_seen"]["student"] == 4 * ITERATIONS * cfg.students.count
    for stage in stages(cfg):
        assert [line["step"] for line in lines(stage) if "images_per_second" in line] == list(range(1, ITERATIONS + 1))
        assert len(list((stage / "samples").iterdir())) == ITERATIONS
    for stage in stages(cfg)[-cfg.students.count :] if cfg.train.eval_kimg else []:
        measured = [line[f"fd@{IMAGES}"] for line in lines(stage) if f"fd@{IMAGES}" in line]
        _, about = load_net(stage / "checkpoints/best.safetensors")
        assert len(measured) == ITERATIONS
        assert about["chosen_by"] == {"metric": f"{summary['student']['features']}@{IMAGES}", "best_of": 1 + measured.index(min(measured))}
    for name in ("report.html", "samples.png", "config.yaml"):
        assert (folder / name).stat().st_size
    nets = weights(folder)
    again = Job(cfg).run()  # and finds it done
    assert [again[name]["fd"] for name in ("teacher", "student")] == [summary[name]["fd"] for name in ("teacher", "student")]
    assert weights(folder) == nets
