"""Pairs of noise and the teacher's sample from it, for methods that need some (`Needs.pairs`): made once, then read."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.engine.diffusion.sampling import heun
from potstill.engine.jobs.workplace import Workplace
from potstill.engine.methods.base import Pairs, PairsNeeded
from potstill.engine.models.generate import one_hot, write_pairs
from potstill.engine.models.weights import read_tensors
from potstill.engine.nets.denoiser import Denoiser


def pairs_of(place: Workplace, teacher: Denoiser, wanted: PairsNeeded) -> Pairs:
    """The pairs of this run folder, the same for all students of the run; classes in turn."""
    path = place.dir / "pairs.safetensors"
    if not place.exists(path):
        place.say(f"making {wanted.count} pairs with {wanted.steps} steps of the teacher")
        place.ranks.alone(lambda: make(path, place, teacher, wanted))
    tensors, _ = read_tensors(path)
    classes = tensors.get("labels")
    labels = None if classes is None else one_hot(classes.numpy(), teacher.label_dim).to(place.device)
    return Pairs(tensors["z"].to(place.device), tensors["y"].to(place.device).float() / 127.5 - 1, labels)


def timing_pairs(stream: Any) -> Pairs:
    """Pairs of the right shapes where only time and memory count: the first batch's images instead of samples."""
    images, labels = stream.at(0)
    return Pairs(torch.randn_like(images), images, labels)


def make(path: Path, place: Workplace, teacher: Denoiser, wanted: PairsNeeded) -> None:
    labels = np.arange(wanted.count) % teacher.label_dim if teacher.label_dim else None
    write_pairs(path, teacher, heun(teacher, wanted.steps), labels, wanted.count, place.cfg.eval.batch, place.device)
