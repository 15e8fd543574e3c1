"""From settings to objects: the only tables of names."""

import copy
import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config import Config, NetConfig
from engine.data.images import Images, open_images
from engine.errors import UserError
from engine.methods import moment_matching
from engine.methods.base import Method, frozen
from engine.methods.dmd import DMD
from engine.methods.gdd import GDD
from engine.methods.msd import make_partition
from engine.methods.sfd import SFD
from engine.methods.sim import SIM
from engine.nets.denoiser import Denoiser
from engine.nets.edm import from_kwargs, without_augmentation
from engine.nets.features import load_features
from engine.nets.router import Partition
from engine.nets.weights import load_net
from engine.training.checkpoint import load_newest
from engine.training.loop import TrainConfig
from engine.training.optim import check_optim
from engine.training.parallel import check_parallel, check_shares

Builder = Callable[[Any, Denoiser, Denoiser], Method]  # settings, teacher, what the student starts as

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _dmd(cfg: Any, teacher: Denoiser, start: Denoiser) -> Method:
    return DMD(cfg, teacher, student=copied(start), fake=copied(teacher))


def _sim(cfg: Any, teacher: Denoiser, start: Denoiser) -> Method:
    return SIM(cfg, teacher, student=copied(start), fake=copied(teacher))


def _moment_matching(cfg: Any, teacher: Denoiser, start: Denoiser) -> Method:
    if cfg.variant == "instant":
        return moment_matching.Instant(cfg, teacher, student=copied(start))
    return moment_matching.Alternating(cfg, teacher, student=copied(start), fake=copied(teacher))


def _gdd(cfg: Any, teacher: Denoiser, start: Denoiser) -> Method:
    features = [load_features(name, frozen(teacher), dtype=PRECISIONS[cfg.feature_dtype]) for name in cfg.features]
    return GDD(cfg, without_augmentation(copied(start)), features)


def _sfd(cfg: Any, teacher: Denoiser, start: Denoiser) -> Method:
    return SFD(cfg, teacher, student=copied(start))


METHODS: dict[str, Builder] = {"dmd": _dmd, "sim": _sim, "moment_matching": _moment_matching, "gdd": _gdd, "sfd": _sfd}


def copied(net: Denoiser) -> Denoiser:
    """A trainable net with the same weights: students and fake nets start from their teacher."""
    return copy.deepcopy(net).requires_grad_(True)


def build_method(cfg: Any, teacher: Denoiser, start: Denoiser | None = None) -> Method:
    """The method that cfg.name names; its student starts as `start`, or like its other nets as the teacher."""
    return METHODS[cfg.name](cfg, teacher, start or teacher)


def build_net(cfg: NetConfig, resolution: int, channels: int, label_dim: int) -> Denoiser:
    """A freshly initialised denoiser for such images."""
    kwargs = {k: v for k, v in dataclasses.asdict(cfg).items() if v is not None and k not in ("precond", "conditional")}
    label_dim = label_dim if cfg.conditional else 0
    try:
        return from_kwargs(cfg.precond, img_resolution=resolution, img_channels=channels, label_dim=label_dim, **kwargs)
    except ValueError as error:
        raise UserError(f"net: {error}") from error


def build_partition(cfg: Config, label_dim: int, images: Images | None) -> Partition | None:
    """Which student has which classes; None where there is one student."""
    count, kind = cfg.students.count, cfg.students.partition
    if cfg.student is not None and not 0 <= cfg.student < count:
        raise UserError(f"student wants 0 … {count - 1}, got {cfg.student}")
    if count == 1:
        return None
    if not label_dim:
        raise UserError(f"students.count = {count} wants a class-conditional teacher: the classes are what is shared out")
    features = None
    if kind == "kmeans":
        if images is None or images.labels is None:
            raise UserError("students.partition=kmeans wants labelled data: it clusters the classes' mean images")
        features = class_means(images, label_dim)
    return make_partition(kind, label_dim, count, cfg.seed, features)


def class_means(images: Images, label_dim: int) -> np.ndarray:
    """The mean image of each class, flattened: [label_dim, C·H·W]."""
    sums, counts = np.zeros((label_dim, images.channels * images.resolution**2)), np.zeros(label_dim)
    for i, label in enumerate(images.labels):
        sums[label] += images.read(i).reshape(-1)
        counts[label] += 1
    return sums / np.maximum(counts, 1)[:, None]


def start_from(method: Method, folder: Path) -> None:
    """Load student and fake net from another run's last checkpoint; heads that it lacks stay new, optimisers too."""
    state = load_newest(folder / "checkpoints", "cpu")
    if state is None:
        raise UserError(f"students.start: no checkpoint in {folder / 'checkpoints'}; wanted a finished run of the same shape")
    for name, net in method.nets.items():
        found = net.load_state_dict(state["nets"].get(name, {}), strict=False)
        lacking = [key for key in found.missing_keys if not key.startswith("head.")]
        if lacking or found.unexpected_keys:
            key = [*lacking, *found.unexpected_keys][0]
            raise UserError(f"students.start: net {name!r} in {folder} is of another shape (first difference: {key})")


def build_images(cfg: Config) -> Images | None:
    """The data set of a run; None for a data-free run."""
    if cfg.rehearse:
        return open_images(rehearsal_data(cfg))
    return open_images(cfg.data.path, resolution=cfg.data.resolution) if cfg.data.path else None


def rehearsal_data(cfg: Config) -> str:
    """Synthetic images as large as the recipe's."""
    if cfg.data.path == "digits":
        return "synthetic:8x1x10"
    classes = 1000 if cfg.net.model_type == "DhariwalUNet" else 0
    size = f"synthetic:{cfg.data.resolution or 64}x3"
    return f"{size}x{classes}" if cfg.net.conditional and classes else size


def load_teacher(path: Path, images: Images | None) -> Denoiser:
    """A teacher from a weight file, checked against the data it shall be distilled on."""
    net, _ = load_net(path)
    if images is None:
        return net
    for what, ours, theirs in (
        ("resolution", net.img_resolution, images.resolution),
        ("number of channels", net.img_channels, images.channels),
    ):
        if ours != theirs:
            convert = f"python -m engine.convert images SRC OUT.zip --resolution {net.img_resolution}"
            raise UserError(f"teacher {path} has {what} {ours}, data {images.name} has {theirs}: {convert} makes data that fits")
    if net.label_dim and (not images.label_dim or net.label_dim < images.label_dim):
        raise UserError(
            f"teacher {path} knows {net.label_dim} classes, data {images.name} has {images.label_dim or 'no labels'}: "
            "use the data it was trained on"
        )
    if net.label_dim:  # of a part of the teacher's data the last classes may be missing; one-hot labels are as wide as ever
        images.label_dim = net.label_dim
    return net


def missing(cfg: Config) -> list[str]:
    """What a run needs and does not find on disk, with the commands that get it."""
    wants = []
    path = cfg.data.path
    if path and path != "digits" and not path.startswith("synthetic:") and not Path(path).exists():
        wants.append(f"data: nothing at {path}. " + (cfg.data.how or "Set data.path to an EDM zip, a folder or an .npz."))
    checkpoint = cfg.teacher.checkpoint
    if checkpoint and not Path(checkpoint).is_file():
        wants.append(f"teacher: no file at {checkpoint}. " + (cfg.teacher.how or "Set teacher.checkpoint to a .safetensors file."))
    return wants + missing_packages(cfg.method)


def missing_packages(method: Any) -> list[str]:
    """Optional packages that a method's settings ask for, where they are not installed."""
    wants = []
    timm = [name for name in getattr(method, "features", []) if name.startswith("timm:")]
    if timm and find_spec("timm") is None:
        wants.append(f"package timm, for {', '.join(timm)}: pip install 'potstill[timm]', or use method.features=[teacher]")
    if getattr(method, "lpips", 0) and find_spec("lpips") is None:
        wants.append("package lpips, for method.lpips: pip install 'potstill[lpips]', or set method.lpips=0")
    return wants


def check_settings(cfg: Config, ranks: int = 1) -> None:
    """UserError for numbers that no run can use, or not on so many ranks."""
    for name, stage in (("teacher.train", cfg.teacher.train), ("train", cfg.train)):
        if stage.batch < 1:
            raise UserError(f"{name}.batch wants at least 1, got {stage.batch}")
        if not stage.kimg > 0:
            raise UserError(f"{name}.kimg wants more than 0, got {stage.kimg}")
        micro = stage.micro_batch
        if isinstance(micro, str) and micro != "auto":
            raise UserError(f"{name}.micro_batch wants a number, auto or null, got {micro!r}")
        if isinstance(micro, int) and (micro < 1 or stage.batch % micro):
            raise UserError(f"{name}.micro_batch = {stage.micro_batch} does not divide {name}.batch = {stage.batch}")
        check_parallel(stage.parallel, stage.fsdp, name)
        if ranks > 1:
            check_shares(stage.batch, micro, ranks, stage.parallel, stage.fsdp, name)
            check_fsdp(cfg, stage, name)
        if stage.log_iterations < 1 or stage.keep < 1:
            raise UserError(f"{name}.log_iterations and {name}.keep want at least 1")
        for net, optim in stage.optim.items():
            check_optim(optim, f"{name}.optim.{net}")
    if cfg.eval.n is not None and cfg.eval.n < 2:
        raise UserError(f"eval.n wants at least 2, got {cfg.eval.n}")
    precision(cfg.precision, device(cfg.device))
    if cfg.eval.features != "pixels" and not Path(cfg.eval.features).is_file():
        raise UserError(f"eval.features wants pixels or a TorchScript file, and there is none at {cfg.eval.features}")


def check_fsdp(cfg: Config, stage: TrainConfig, name: str) -> None:
    """UserError for what sharded nets cannot do."""
    if stage.parallel != "fsdp":
        return
    if stage.micro_batch == "auto":
        raise UserError(f"{name}.micro_batch=auto cannot try sizes with sharded nets, which do not survive it: give a number")
    sees_weights = getattr(cfg.method, "variant", "") == "instant" or cfg.method.name == "gdd"
    if stage.fsdp.teacher == "shard" and sees_weights and name == "train":
        raise UserError(
            f"{name}.fsdp.teacher=shard cannot be had with method {cfg.method.name}, which differentiates the teacher in ways "
            f"that shards do not know: use {name}.fsdp.teacher=replicate"
        )


def check_complete(cfg: Config) -> None:
    """UserError with every missing thing and the commands that get it, in one message."""
    if wants := missing(cfg):
        are = "thing is" if len(wants) == 1 else "things are"
        raise UserError(f"{len(wants)} {are} missing:" + "".join(f"\n  - {want}" for want in wants))


def device(name: str) -> torch.device:
    """The device a name stands for; "auto" is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise UserError(f"device wants auto, cpu, cuda or cuda:N, got {name!r}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}, but torch sees no CUDA device: use device=cpu or auto")
    return chosen


def precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype the U-Nets compute in, and why."""
    if name != "auto":
        if name not in PRECISIONS:
            raise UserError(f"precision wants auto, {', '.join(PRECISIONS)}, got {name!r}")
        return PRECISIONS[name], "asked for"
    if device.type == "cuda":
        return (torch.bfloat16, "the GPU has it") if torch.cuda.is_bf16_supported() else (torch.float32, "the GPU lacks bf16")
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return (torch.bfloat16, "this CPU multiplies bf16 in hardware") if fast else (torch.float32, "this CPU has no bf16 units")
