"""From settings to objects: the only tables of names."""

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import Config, NetConfig
from potstill.engine.data.images import Images, open_images
from potstill.engine.methods import moment_matching
from potstill.engine.methods.base import Method, frozen
from potstill.engine.methods.dmd import DMD
from potstill.engine.methods.gdd import GDD
from potstill.engine.methods.msd import make_partition
from potstill.engine.methods.sfd import SFD
from potstill.engine.methods.sim import SIM
from potstill.engine.models.router import Partition
from potstill.engine.models.weights import load_net
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.edm import from_kwargs, without_augmentation
from potstill.engine.nets.features import load_features, load_timm
from potstill.engine.nets.perceptual import LPIPS
from potstill.engine.skipping.apply import Guard, Skipping
from potstill.engine.skipping.plan import Plan, SkippingConfig, check_plan, load_plan
from potstill.engine.training.checkpoint import load_newest
from potstill.kernels import native

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


def lighten(method: Method, cfg: SkippingConfig, say: Callable[[str], None]) -> Guard | None:
    """Let the method's teacher leave out layers as cfg says; returns the guard for its run, or None where nothing is asked.

    UserError if the method has no teacher for that, or the plan is another teacher's.
    """
    walks = check_lightens(method, cfg)
    if not cfg.plan and cfg.cache == 1:
        return None
    teacher: Denoiser = method.teacher  # pyright: ignore[reportAttributeAccessIssue]  # check_lightens has found it
    plan = check_own_plan(cfg, teacher)
    if (plan is None or plan.empty) and cfg.cache == 1:
        say(f"skipping: {cfg.plan} leaves out nothing, so the teacher stays as it is")
        return None
    light = Skipping(teacher, plan, None if walks else method.teacher_level, cfg.cache)
    method.teacher = light  # pyright: ignore[reportAttributeAccessIssue]
    method.stratified = not walks
    return Guard(light, cfg, say)


def check_lightens(method: Method, cfg: SkippingConfig) -> bool:
    """Does this method let its teacher walk? UserError if `cfg` asks for what its teacher cannot do."""
    name = type(method).__name__
    if (cfg.plan or cfg.cache > 1) and not isinstance(getattr(method, "teacher", None), Denoiser):
        raise UserError(
            f"skipping is for methods that ask a teacher for denoised images, and {name} does not: unset skipping.plan and skipping.cache"
        )
    walks = method.teacher_level(torch.zeros(1)) is None
    if cfg.cache > 1 and not walks:
        raise UserError(f"skipping.cache is for teachers that walk (method sfd), and {name} asks for single noise levels: set it to 1")
    return walks


def check_own_plan(cfg: SkippingConfig, teacher: Denoiser) -> Plan | None:
    """The plan that cfg names, which must be this teacher's; None for none."""
    if not cfg.plan:
        return None
    plan = load_plan(Path(cfg.plan).expanduser())
    check_plan(plan, teacher, cfg.plan)
    return plan


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
    if count == 1:
        return None
    if not label_dim:
        raise UserError(f"students.count = {count} wants a class-conditional teacher: the classes are what is shared out")
    features = None
    if kind == "kmeans":
        if images is None or images.labels is None:
            raise UserError("students.partition=kmeans wants labelled data: it clusters the classes' mean images")
        features = class_means(images, label_dim)
    partition = make_partition(kind, label_dim, count, cfg.seed, features)
    without = set(classes_without_images(images, label_dim))
    for student in range(count):
        if without.issuperset(share := partition.classes(student)):
            assert images is not None  # else every class counts as one with images
            raise UserError(
                f"student {student} of {count} has no images: {images.name} has none of {listed(share)}; take fewer students or "
                "another students.partition"
            )
    return partition


def classes_without_images(images: Images | None, label_dim: int) -> list[int]:
    """Which of a net's classes the labelled data show nothing of, ascending."""
    if images is None or images.labels is None:
        return []
    return np.setdiff1d(np.arange(label_dim), images.labels).tolist()


def class_means(images: Images, label_dim: int) -> np.ndarray:
    """The mean image of each class, flattened: [label_dim, C·H·W]. UserError for a class without an image."""
    if without := classes_without_images(images, label_dim):
        raise UserError(
            f"students.partition=kmeans wants images of every class, {images.name} has none of {listed(without)}: take blocks or random"
        )
    assert images.labels is not None
    sums, counts = np.zeros((label_dim, images.channels * images.resolution**2)), np.zeros(label_dim)
    for i, label in enumerate(images.labels):
        sums[label] += images.read(i).reshape(-1)
        counts[label] += 1
    return sums / counts[:, None]


def listed(classes: list[int]) -> str:
    """Classes in a sentence, the first five of many."""
    more = f" and {len(classes) - 5:,} more" if len(classes) > 5 else ""
    return f"class{'es' * (len(classes) > 1)} {', '.join(map(str, classes[:5]))}{more}"


def start_from(method: Method, folder: Path) -> None:
    """Load student and fake net from another run's last checkpoint; heads that it lacks stay new, optimisers too."""
    for name, weights in start_of(method, folder).items():
        method.nets[name].load_state_dict(weights, strict=False)


def start_of(method: Method, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights for each of the method's nets in another run's last checkpoint. UserError unless they fit, heads left aside."""
    state = load_newest(folder / "checkpoints", "cpu")
    if state is None:
        raise UserError(f"students.start: no checkpoint in {folder / 'checkpoints'}; wanted a finished run of the same shape")
    for name, net in method.nets.items():
        theirs = {key: t.shape for key, t in state["nets"].get(name, {}).items()}
        ours = {key: t.shape for key, t in net.state_dict().items() if not key.startswith("head.") or key in theirs}
        if other := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
            raise UserError(f"students.start: net {name!r} in {folder} is of another shape (first difference: {other[0]})")
    return {name: state["nets"][name] for name in method.nets}


def build_images(cfg: Config) -> Images | None:
    """The data set of a run; None for a data-free run."""
    if cfg.rehearse:
        return open_images(rehearsal_data(cfg))
    if not cfg.data.path:
        return None
    return open_images(cfg.data.path, resolution=cfg.data.resolution, labelled=not cfg.data.unlabelled)


def rehearsal_data(cfg: Config) -> str:
    """Synthetic images as large as the recipe's."""
    digits, labelled = cfg.data.path == "digits", not cfg.data.unlabelled
    guided = getattr(cfg.method, "guidance", 1) != 1  # so there are classes
    classes = 10 if digits else 0 if not cfg.net.conditional else 1000 if cfg.net.model_type == "DhariwalUNet" else 10 * guided
    size = "synthetic:8x1" if digits else f"synthetic:{cfg.data.resolution or 64}x3"
    return f"{size}x{classes}" if classes and labelled else size


def rehearsal_size(cfg: Config) -> tuple[int, int, int]:
    """Resolution, channels and classes of those images."""
    resolution, channels, classes = (int(s) for s in f"{rehearsal_data(cfg)}x0".partition(":")[2].split("x")[:3])
    return resolution, channels, classes


def lpips_setting(method: Any) -> str | None:
    """The setting of a method by which it asks for LPIPS, None where it asks for none."""
    if getattr(method, "regression", 0) and method.regression_metric == "lpips":
        return "regression"
    return "lpips" if getattr(method, "lpips", 0) else None


def fetch_helpers(cfg: Any) -> None:
    """Load once, and thereby download, what the method's settings name beside its teacher, where that is yet to be trained."""
    for name in getattr(cfg, "features", []):
        if name.startswith("timm:"):
            load_timm(name.partition(":")[2], torch.float32)
    if lpips_setting(cfg):
        LPIPS()


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
            convert = f"potstill convert images SRC OUT.zip --resolution {net.img_resolution}"
            raise UserError(f"teacher {path} has {what} {ours}, data {images.name} has {theirs}: {convert} makes data that fits")
    if net.label_dim and (not images.label_dim or net.label_dim < images.label_dim):
        raise UserError(
            f"teacher {path} knows {net.label_dim} classes, data {images.name} has {images.label_dim or 'no labels'}: "
            "use the data it was trained on"
        )
    if net.label_dim:  # of a part of the teacher's data the last classes may be missing; one-hot labels are as wide as ever
        images.label_dim = net.label_dim
    return net


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
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return (torch.bfloat16, "this CPU multiplies bf16 in hardware") if fast else (torch.float32, "this CPU has no bf16 units")
