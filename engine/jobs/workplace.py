"""Where a run works: its folder, the device and precision of its nets, its images and pairs, and the ranks that share the work."""

import sys
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from potstill.engine.config.schema import Config
from potstill.engine.data.images import Images
from potstill.engine.data.sampler import Stream
from potstill.engine.diffusion.sampling import heun
from potstill.engine.jobs import build, machine
from potstill.engine.jobs.told import TextStream, Told
from potstill.engine.methods.base import Pairs, PairsNeeded
from potstill.engine.models.generate import one_hot, write_pairs
from potstill.engine.models.opening import device_named
from potstill.engine.models.origins import is_pipeline, local_path, metadata_of_origin
from potstill.engine.models.weights import is_whole, read_tensors, save_net
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.edm2_latents import ENCODER as STABILITY_ENCODER
from potstill.engine.training.posthoc import profile_file
from potstill.engine.training.ranks import Ranks
from potstill.engine.training.run import Run, TrainConfig


class Share(NamedTuple):
    """What a stage is trained on: real samples, what nets are told beside classes, and the classes to draw from; None: none, none, all."""

    images: Images | None
    told: Told | None
    classes: list[int] | None = None


class Workplace:
    """What all stages of a run have in common."""

    def __init__(self, cfg: Config, ranks: Ranks):
        self.cfg, self.ranks, self.dir = cfg, ranks, Path(cfg.run_dir or "").expanduser()
        self.given_teacher = local_path(cfg.teacher.checkpoint) if cfg.teacher.checkpoint else None
        self.device = ranks.connect(device_named(cfg.device))
        self.dtype, self.why_dtype = machine.set_up(cfg, self.device, self.say)
        self.images = build.build_images(cfg)
        self.told: Told | None = None  # of a teacher that is told prompts

    def say(self, text: str) -> None:
        """Print a line on stderr, once for all ranks."""
        if self.ranks.first:
            print(text, file=sys.stderr)

    def exists(self, path: Path) -> bool:
        """Did this file exist when rank 0 looked?"""
        return self.ranks.agree(path.exists())

    def made(self, path: Path) -> bool:
        """Is this file of the run's own there, and whole? If it is damaged rank 0 says so, and it is made again."""
        return bool(self.ranks.agree(self.ranks.on_first(lambda: path.exists() and is_whole(path, self.say))))

    def prepared(self, net: Any, stage: TrainConfig | None = None) -> Any:
        """A net on the device, computing in the precision of this run and keeping what its stage says; null: distillation."""
        for module in net.modules():
            if isinstance(module, Denoiser):
                module.recompute((stage or self.cfg.train).activation_checkpointing)
                module.compute_dtype = self.dtype
                if module.guide is not None:
                    self.prepared(module.guide.net)
        return net.to(self.device)

    def share(self, student: int | None = None) -> Share:
        """Everything there is."""
        return Share(self.images, self.told)

    def stream(self, cfg: TrainConfig, share: Share, window: slice = slice(None), asks: int = 1) -> Any:
        """This rank's part of every batch of a share. asks: the method's."""
        samples = self.samples(cfg, share.images, window)
        if share.told is None:
            return samples
        return TextStream(samples, share.told, batch=cfg.batch, asks=asks, seed=self.cfg.seed, window=window)

    def samples(self, cfg: TrainConfig, images: Images | None, window: slice) -> Any:
        if images is None:
            return NoImages(len(range(*window.indices(cfg.batch))), self.device)
        data = self.cfg.data
        return Stream(
            images, batch=cfg.batch, seed=self.cfg.seed, flips=data.flips, workers=data.workers, device=self.device, window=window
        )

    def pairs(self, teacher: Denoiser, wanted: PairsNeeded) -> Pairs:
        """Pairs of noise and the teacher's sample from it, made once: the same for all students of the run, classes in turn."""
        path = self.dir / "pairs.safetensors"
        if not self.made(path):
            self.say(f"making {wanted.number} pairs with {wanted.steps} steps of the teacher")
            in_turn = np.arange(wanted.number) % teacher.label_dim if teacher.label_dim else None
            sampler, batch = heun(teacher, wanted.steps), self.cfg.eval.batch
            self.ranks.on_first(lambda: write_pairs(path, teacher, sampler, in_turn, wanted.number, batch, self.device))
        tensors, _ = read_tensors(path)
        classes = tensors.get("labels")
        labels = None if classes is None else one_hot(classes.numpy(), teacher.label_dim).to(self.device)
        return Pairs(tensors["z"].to(self.device), tensors["y"].to(self.device).float() / 127.5 - 1, labels)

    def save(self, run: Run, path: Path, **more: Any) -> None:
        """Write the average of a run's product as a weight file that says what it is and where it comes from."""
        product = run.average()
        assert isinstance(product, Denoiser)
        self.ranks.on_first(lambda: save_net(path, product, **self.about(run), **self.named(product), **more))

    def keep_profiles(self, run: Run, folder: Path, **more: Any) -> dict[str, float]:
        """Write the averages of `train.phema` as weight files, of which `potstill convert phema` makes one of any length."""
        about = self.about(run)
        del about["seconds"]  # a run that goes on writes the same files again
        for std in run.cfg.phema:
            average, path = run.profile(std), profile_file(folder, run.images_seen, std)
            assert isinstance(average, Denoiser)
            said = about | self.named(average) | more | {"phema": {"std": std, "images": run.images_seen}}
            self.ranks.on_first(lambda net=average, path=path, said=said: save_net(path, net, **said))
        return {}

    def about(self, run: Run) -> dict[str, Any]:
        """What a weight file of a stage says of itself."""
        return {
            "sampler": run.method.sampler.to_dict(), "kimg": run.kimg, "seconds": round(run.seconds, 1),
            "method": self.cfg.method.name if run.method.product == "student" else "teacher",
            "data": self.images.name if self.images else "none", **self.inherited,
        }  # fmt: skip

    def named(self, net: Denoiser) -> dict[str, Any]:
        """What a weight file says of its net's classes, where they have names."""
        return {"classes": self.class_names} if net.label_dim and self.class_names else {}

    @cached_property
    def class_names(self) -> list[str] | None:
        """Names of the classes, or of the first of them: the teacher's, which knows what it was told, else the data's."""
        given = self.given_teacher
        own = metadata_of_origin(given) if given and given.is_file() else {}  # a dry run's may be missing
        return own.get("classes") or (self.images.classes if self.images else None)

    @cached_property
    def inherited(self) -> dict[str, Any]:
        """What a weight file of this run has from its teacher's: the licence, what its latents are, and which teacher it was."""
        if not (path := self.given_teacher):
            return {"encoder": STABILITY_ENCODER} if self.images is not None and self.images.moments else {}
        own = metadata_of_origin(path)
        if is_pipeline(path):
            return {"teacher": {"source": str(self.cfg.teacher.checkpoint)}}
        teacher = {key: own[key] for key in ("source", "sha256") if key in own} or own.get("teacher") or {"source": path.name}
        return {"teacher": teacher} | {key: own[key] for key in ("license", "encoder") if key in own}


class NoImages:
    """The stream of a data-free run: no labels, and blank images that only say how many."""

    def __init__(self, batch: int, device: torch.device):
        self.blank = torch.zeros(batch, 1, 1, 1, device=device)

    def at(self, step: int) -> tuple[torch.Tensor, None]:
        return self.blank, None
