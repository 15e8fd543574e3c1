"""From settings and files to what a run begins with: its images, a net of their size, its teacher, whole or without some layers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from potstill.engine.common.errors import UserError
from potstill.engine.config.schema import Config, NetConfig, TeacherConfig
from potstill.engine.data.images import Images, open_images
from potstill.engine.data.pipelines import decodes
from potstill.engine.data.sources import is_there
from potstill.engine.diffusion.sampling import Sampler, heun
from potstill.engine.formats.newborn import WORDS, another_net, fresh_net, width_of
from potstill.engine.methods.base import Method
from potstill.engine.models.opening import own_sampler
from potstill.engine.models.origins import is_pipeline, load_origin, local_path, metadata_of_origin
from potstill.engine.models.weights import load_net
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.families import FAMILIES
from potstill.engine.nets.guide import led_by
from potstill.engine.readers.edm_arguments import argument
from potstill.engine.readers.pickles import Unreadable
from potstill.engine.skipping.apply import Guard, Skipping
from potstill.engine.skipping.blocks import with_unet
from potstill.engine.skipping.plan import Plan, SkippingConfig, check_plan, load_plan

EDM2 = "EDM2Precond"  # the one class that has but one U-Net


def build_net(cfg: NetConfig, resolution: int, channels: int, label_dim: int) -> Denoiser:
    """A freshly initialised denoiser for such images."""
    others = ("precond", "conditional", "config", "prediction", *(["model_type"] if cfg.precond == EDM2 else []))
    kwargs = {k: v for k, v in dataclasses.asdict(cfg).items() if v is not None and k not in others}
    label_dim = label_dim if cfg.conditional else 0
    try:
        net = from_kwargs(cfg.precond, img_resolution=resolution, img_channels=channels, label_dim=label_dim, **kwargs)
        for name, value in kwargs.items():
            argument(name, value)  # as a weight file's are checked, so that what is trained can be loaded
    except Unreadable as error:
        raise UserError(f"net.{str(error).removeprefix('holds a net made with ')}") from error
    except ValueError as error:
        raise UserError(f"net: {error}") from error
    return net


def fresh_teacher(cfg: Config, images: Images) -> Denoiser:
    """A teacher that knows nothing yet, for these images and, of a class of diffusers, for the captions' encoder."""
    if is_text(cfg.net):
        return fresh_net(cfg.net.model_type, cfg.net.config, cfg.net.prediction, images.shape, width_of(encoder_of(cfg)))
    net = build_net(cfg.net, images.resolution, images.channels, images.label_dim)  # what is wrong with it on any data is said first
    if len(images.shape) != 3 or images.shape[1] != images.shape[2]:
        raise UserError(
            f"net.precond={cfg.net.precond} is of nets for squares [C, H, H], data {images.name} has {list(images.shape)}: give latents of "
            "square pictures, or a teacher for these (teacher.checkpoint)"
        )
    return net


def student_net(cfg: NetConfig, teacher: Denoiser) -> Denoiser:
    """A fresh net of another shape than the teacher's (TSM). Of a teacher of diffusers: its class, with these settings in place of its own."""
    if not isinstance(teacher, DiffusersDenoiser):
        return build_net(cfg, teacher.img_resolution, teacher.img_channels, teacher.label_dim)
    if cfg.model_type != teacher.name:
        raise UserError(
            f"students.net.model_type={cfg.model_type} cannot learn from a {teacher.name}: wanted {teacher.name}, with another config"
        )
    return another_net(teacher, cfg.config or {})


def is_text(cfg: NetConfig) -> bool:
    """Is it a net of diffusers, which is told prompts?"""
    return cfg.model_type in FAMILIES


def encoder_of(cfg: Config) -> str:
    return cfg.text.encoder or WORDS


def build_images(cfg: Config) -> Images | None:
    """The data set of a run, synthetic for a rehearsal; None for a data-free run, and where there is nothing at its path yet."""
    if cfg.rehearse:
        return open_images(rehearsal_data(cfg))
    if not cfg.data.path or not is_there(cfg.data.path):
        return None
    images = open_images(cfg.data.path, resolution=cfg.data.resolution, labelled=not cfg.data.unlabelled, captions=cfg.data.captions)
    if cfg.data.channels not in (None, images.channels):
        raise UserError(
            f"{images} have {images.channels} channels, data.channels wants {cfg.data.channels}: name other data, or set it to null"
        )
    return images


def rehearsal_data(cfg: Config) -> str:
    """Synthetic images as large as the recipe's."""
    resolution, channels, classes = rehearsal_size(cfg)
    return f"synthetic:{resolution}x{channels}" + f"x{classes}" * bool(classes)


def rehearsal_size(cfg: Config) -> tuple[int, int, int]:
    """Resolution, channels and classes of those images."""
    some = 10 * cfg.method.needs().classes
    digits = cfg.data.path == "digits"
    classes = 10 if digits else 0 if not cfg.net.conditional else 1000 if imagenet(cfg.net) else some
    resolution, channels = (8, 1) if digits else (cfg.data.resolution or 64, cfg.data.channels or 3)
    return resolution, channels, 0 if cfg.data.unlabelled else classes


def imagenet(cfg: NetConfig) -> bool:
    """Is it a net that ImageNet's recipes have?"""
    return cfg.model_type == "DhariwalUNet" or cfg.precond == EDM2


def load_teacher(
    path: Path, images: Images | None, cfg: TeacherConfig | None = None, *, dtype: torch.dtype | None = None, planned: bool = False
) -> Denoiser:
    """A teacher from a weight file or pipeline, with its guide if it has one, checked against the data it shall be distilled on.

    dtype: of a pipeline's weights; None: float32. planned: a pipeline's denoiser without numbers.
    """
    cfg = cfg or TeacherConfig()
    net = _fitting_teacher(path, images, cfg, dtype, planned)
    return with_guide(net, cfg)


def with_guide(net: Denoiser, cfg: TeacherConfig) -> Denoiser:
    """The teacher, led away from the net in `teacher.guide`, if there is one. UserError where it is of another task."""
    return led_by(net, load_net(Path(cfg.guide).expanduser())[0], cfg.guide) if cfg.guide else net


def _fitting_teacher(path: Path, images: Images | None, cfg: TeacherConfig, dtype: torch.dtype | None, planned: bool) -> Denoiser:
    pictures = is_pipeline(path) and not decodes(path)  # are what its net works on?
    size = tuple(cfg.size) if cfg.size else images.shape[1:] if images is not None and (images.latent or pictures) else None
    net = load_origin(path, dtype=dtype, size=size, guidance=cfg.embedded_guidance, planned=planned)
    if images is None:
        return net
    if images.latent or images.shape[1] != images.shape[2] or net.shape[1] != net.shape[-1] or len(net.shape) != 3:
        if images.shape != net.shape:
            raise UserError(
                f"teacher {path} makes samples {list(net.shape)}, data {images.name} has {list(images.shape)}: potstill convert latents SRC OUT "
                f"--pipeline {path} makes data that fits, or set teacher.size"
            )
    elif is_pipeline(path) and images.channels != net.img_channels:
        raise UserError(
            f"teacher {path} makes latents of {net.img_channels} channels, data {images.name} has images of {images.channels}: potstill convert "
            f"latents {images.name} OUT --pipeline {path} makes data that fits"
        )
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


def teacher_sampler(cfg: Config, teacher: Denoiser) -> Sampler:
    """EDM's Heun; a given teacher that is a student of an earlier stage is sampled as it was trained.

    A pipeline's, and one with a guide of its own, is guided as the student sees it (`method.guidance`).
    """
    own = taught_sampler(local_path(cfg.teacher.checkpoint)) if cfg.teacher.checkpoint else None
    walk = heun(teacher, cfg.teacher.loss.sampling_steps)
    guided = (isinstance(teacher, DiffusersDenoiser) and teacher.guidable) or teacher.guide is not None
    return own or (dataclasses.replace(walk, guidance=getattr(cfg.method, "guidance", 1.0)) if guided else walk)


def taught_sampler(file: Path) -> Sampler | None:
    """How a teacher is sampled that is a student of an earlier stage; None for one that denoises at every level."""
    own = metadata_of_origin(file)
    return own_sampler(own, file) if own.get("method", "teacher") != "teacher" else None


def lighten(method: Method, cfg: SkippingConfig, say: Callable[[str], None]) -> Guard | None:
    """Let the method's teacher leave out layers as cfg says; returns the guard for its run, or None where nothing is asked.

    UserError if the method has no teacher for that, or the plan is another teacher's.
    """
    walks = check_lighten(method, cfg)
    if not cfg.plan and cfg.cache == 1:
        return None
    teacher = with_unet(method.teacher)  # pyright: ignore[reportAttributeAccessIssue]  # check_lighten has found it
    plan = own_plan(cfg, teacher)
    if (plan is None or plan.empty) and cfg.cache == 1:
        say(f"skipping: {cfg.plan} leaves out nothing, so the teacher stays as it is")
        return None
    light = Skipping(teacher, plan, None if walks else method.teacher_level, cfg.cache)
    method.teacher = light  # pyright: ignore[reportAttributeAccessIssue]
    method.stratified = not walks
    return Guard(light, cfg, say)


def check_lighten(method: Method, cfg: SkippingConfig) -> bool:
    """Does this method let its teacher walk? UserError if `cfg` asks for what its teacher cannot do."""
    name = type(method).__name__
    if (cfg.plan or cfg.cache > 1) and not isinstance(getattr(method, "teacher", None), Denoiser):
        raise UserError(
            f"skipping is for methods that ask a teacher for denoised images, and {name} does not: unset skipping.plan and skipping.cache"
        )
    if cfg.plan or cfg.cache > 1:
        with_unet(method.teacher)  # pyright: ignore[reportAttributeAccessIssue]
    walks = method.teacher_level(torch.zeros(1)) is None
    if cfg.cache > 1 and not walks:
        raise UserError(f"skipping.cache is for teachers that walk (method sfd), and {name} asks for single noise levels: set it to 1")
    return walks


def own_plan(cfg: SkippingConfig, teacher: Denoiser) -> Plan | None:
    """The plan that cfg names, which must be this teacher's; None for none."""
    if not cfg.plan:
        return None
    plan = load_plan(Path(cfg.plan).expanduser())
    check_plan(plan, with_unet(teacher), cfg.plan)
    return plan
