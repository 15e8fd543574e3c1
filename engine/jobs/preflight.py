"""What a run checks before it trains anything; --dry-run does the very same.

A value that no run can use is an error of its own dataclass (`engine.common.checks`). Here is what depends on something else: the device,
the number of ranks, other settings, files, packages. And the run on paper: its teacher and method on the meta device, so that what is
wrong with them is found now and not after hours of training the teacher. What lies on disk is opened; of what does not yet, there is a
stand-in of the size that the settings name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from potstill.engine.common.download import cached_path, is_url
from potstill.engine.common.errors import UserError
from potstill.engine.common.packages import Extra
from potstill.engine.config.schema import Config
from potstill.engine.data.images import Images
from potstill.engine.data.sources import is_there
from potstill.engine.jobs import build, machine
from potstill.engine.jobs.inputs import Marks, check_inputs, marks_of
from potstill.engine.jobs.shares import check_prompts
from potstill.engine.jobs.students import (
    check_same_part,
    classes_without_images,
    earlier_place,
    earlier_weights,
    has_begun,
    is_earlier,
    partition_of,
)
from potstill.engine.jobs.told import check_caches, check_told
from potstill.engine.measure.networks import INCEPTION_URL, check_features_name
from potstill.engine.measure.scores import check_score_names
from potstill.engine.methods.base import Method
from potstill.engine.models import origins
from potstill.engine.models.decoding import fetch_vae, is_vae
from potstill.engine.models.opening import device_named
from potstill.engine.models.origins import is_pipeline, local_path
from potstill.engine.models.partitions import KMEANS, Partition
from potstill.engine.models.weights import is_whole
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.lora import check_lora
from potstill.engine.training.compile import check_compile
from potstill.engine.training.graphs import check_graphs
from potstill.engine.training.parallel import check_shares
from potstill.engine.training.ranks import Ranks
from potstill.engine.training.run import TrainConfig
from potstill.kernels import cuda


def check_settings(cfg: Config, ranks: int = 1) -> None:
    """UserError for settings that do not go with one another, with this device or with so many ranks."""
    device = device_named(cfg.device)
    if device.type == "cuda" and (without := cuda.lacking("noising")):
        raise UserError(f"device={cfg.device}: {without}")
    for name, stage in stages(cfg):
        if ranks > 1:
            statistics = name == "train" and cfg.method.needs().batch_statistics
            check_shares(stage.batch, stage.micro_batch, ranks, stage.parallel, stage.fsdp, name, statistics=statistics)
            check_fsdp(cfg, stage, name)
        check_compile(stage.compile, device, f"{name}.compile")
        check_graphs(stage.graphs, device, name, ranks)
    machine.precision(cfg.precision, device)
    machine.check_algorithms(cfg.cudnn_benchmark, cfg.deterministic, device)
    if cfg.data.path and not cfg.rehearse:
        check_features_name(cfg.eval.features)
    if not cfg.rehearse:
        check_score_names(cfg.eval.scores)


def stages(cfg: Config) -> Iterator[tuple[str, TrainConfig]]:
    """What this run trains, by the names of its settings: the teacher, students' common start, the student."""
    if not cfg.teacher.checkpoint:
        yield "teacher.train", cfg.teacher.train
    if cfg.students.net:
        yield "students.tsm", cfg.students.tsm
    yield "train", cfg.train


def check_fsdp(cfg: Config, stage: TrainConfig, name: str) -> None:
    """UserError for what sharded nets cannot do."""
    if stage.parallel != "fsdp":
        return
    if stage.micro_batch == "auto":
        raise UserError(f"{name}.micro_batch=auto cannot try sizes with sharded nets, which do not survive it: give a number")
    if stage.compile == "net":
        raise UserError(f"{name}.compile=net wants whole nets, and {name}.parallel=fsdp cuts them at every block: use blocks, or ddp")
    if name == "train" and (cfg.skipping.plan or cfg.skipping.cache > 1):
        if cfg.skipping.guard_iterations:
            raise UserError(
                "skipping compares gradients of whole nets, which train.parallel=fsdp does not have: use ddp, or do without "
                "with skipping.guard_iterations=0"
            )
        if stage.fsdp.teacher == "shard":
            raise UserError("a teacher that leaves out layers cannot be sharded: use train.fsdp.teacher=replicate")
    if name == "train" and stage.fsdp.teacher == "shard" and cfg.method.needs().whole_teacher:
        raise UserError(
            f"{name}.fsdp.teacher=shard cannot be had with method {cfg.method.name}, which differentiates the teacher in ways "
            f"that shards do not know: use {name}.fsdp.teacher=replicate"
        )


def check_optimizers(cfg: Config, method: Method) -> None:
    """UserError for an optimiser of a net that is not trained; "student"'s is for all that have none of their own."""
    known = {"teacher.train": {"teacher"}, "students.tsm": set(), "train": set(method.nets)}
    for name, stage in stages(cfg):
        wanted = known[name] | {"student"}
        if unknown := [net for net in stage.optim if net not in wanted]:
            raise UserError(f"{name}.optim wants {' or '.join(sorted(wanted))}, which are trained here, got {unknown[0]!r}")


def check_begins(cfg: Config, method: Method) -> None:
    """UserError for a run that is over before the student's first turn."""
    before_last = (max(1, round(cfg.train.kimg * 1000 / cfg.train.batch)) - 1) * cfg.train.batch
    begins = min(turn.seen[0] for turn in method.turns if turn.trains == method.product)
    if begins > 0 and before_last <= begins:
        raise UserError(
            f"train.kimg = {cfg.train.kimg:g} is over before the student begins to learn, {begins / 1000:g} thousand images later than the "
            "other nets: train longer, or lower method.student_after"
        )


FROM_HUB = "potstill train downloads it from the Hugging Face hub once nothing else is missing, safetensors only"


def without_data(cfg: Config) -> bool:
    """Are there no images where the settings name some, in a run that trains without any and only measures with them?"""
    path, students = cfg.data.path, cfg.students
    told = cfg.teacher.checkpoint and not students.net and (students.count == 1 or students.partition != KMEANS)
    return bool(path and not is_there(path) and told) and not cfg.method.needs().data


def check_given_data(cfg: Config) -> None:
    """Missing where there are no images at the path that a user has typed, also in a run that trains without."""
    if without_data(cfg) and not cfg.rehearse:
        raise Missing.of([_no_data(cfg), *missing(cfg)])


def _no_data(cfg: Config) -> str:
    other = "Set data.path to an EDM zip, a folder, an .npz, .tar shards or hf:NAME."
    return f"data: nothing at {cfg.data.path}. " + (cfg.data.how or other)


def missing(cfg: Config) -> list[str]:
    """What a run needs and does not find on disk, with the commands that get it."""
    wants = []
    path = cfg.data.path
    if path and not is_there(path) and not without_data(cfg):
        wants.append(_no_data(cfg))
    checkpoint = cfg.teacher.checkpoint
    if checkpoint and not origins.is_there(checkpoint):
        other = "Set teacher.checkpoint to a .safetensors file, or to a pipeline of diffusers."
        sentences = [f"{FROM_HUB}.", cfg.teacher.how] if origins.on_hub(checkpoint) else [cfg.teacher.how or other]
        wants.append(f"teacher: no file or pipeline at {checkpoint}. " + " ".join(filter(None, sentences)))
    guide = cfg.teacher.guide
    if guide and not Path(guide).expanduser().is_file():
        wants.append(
            f"guide: no file at {guide}. Set teacher.guide to a .safetensors file, of a smaller or less trained net than the teacher"
        )
    if vae_to_come(cfg):
        other = (
            FROM_HUB if origins.on_hub(str(cfg.teacher.vae)) else "It is a folder with config.json and diffusion_pytorch_model.safetensors"
        )
        wants.append(f"VAE: nothing at {cfg.teacher.vae}. {other}; or set teacher.vae=null")
    prompts = cfg.text.prompts
    if prompts and not Path(prompts).expanduser().exists():
        wants.append(f"prompts: nothing at {prompts}. Give text.prompts=FILE, a .txt with one prompt a line or a .jsonl with one in each")
    plan = cfg.skipping.plan
    if plan and not Path(plan).expanduser().is_file():
        unlabelled = " --unlabelled" if cfg.data.unlabelled else ""
        wants.append(f"plan: no file at {plan}. potstill probe TEACHER.safetensors --data {path or 'DATA'}{unlabelled} --out {plan}")
    students = range(cfg.students.count) if cfg.student is None else [cfg.student]
    if lacking := [one for k in students if (one := earlier_place(cfg, k)) and not is_earlier(one) and not has_begun(cfg, k)]:
        first = lacking[0]
        where = f"no weight file at {first}" if first.suffix == ".safetensors" else f"no checkpoint in {first / 'checkpoints'}"
        wants.append(f"students.start: {where}. potstill train RECIPE of the stage before makes some")
    logs = [Extra("wandb", "log.wandb", "set log.wandb=null")] if cfg.log.wandb else []
    pipelines = [Extra("diffusers", f"teacher.checkpoint={checkpoint}", "give a .safetensors file")] if to_come(cfg) else []
    vaes = [Extra("diffusers", f"teacher.vae={cfg.teacher.vae}", "set teacher.vae=null")] if cfg.teacher.vae else []
    return wants + [sentence for extra in (*cfg.method.needs().extras, *logs, *pipelines, *vaes) for sentence in extra.missing()]


def to_come(cfg: Config) -> str:
    """The teacher that is named as pipelines on the hub are, and is not here; "" for any other."""
    name = cfg.teacher.checkpoint or ""
    return name if origins.to_come(name) else ""


def vae_to_come(cfg: Config) -> bool:
    """Is there no VAE where one is named?"""
    return cfg.teacher.vae is not None and not is_vae(cfg.teacher.vae)


def fetch_teacher(cfg: Config) -> None:
    """Download the teacher, or its VAE, from the hub, once nothing else is missing. UserError where there is none such."""
    if (name := to_come(cfg)) and len(missing(cfg)) == 1:
        origins.fetch(name, cfg.teacher.how)
    if vae_to_come(cfg) and origins.on_hub(name := str(cfg.teacher.vae)) and len(missing(cfg)) == 1:
        fetch_vae(name)


class Missing(UserError):
    """Something is not on disk that a run needs."""

    @classmethod
    def of(cls, wants: list[str]) -> "Missing":
        """All of it in one message."""
        are = "thing is" if len(wants) == 1 else "things are"
        return cls(f"{len(wants)} {are} missing:" + "".join(f"\n  - {want}" for want in wants))


def check_complete(cfg: Config, *, on_paper: bool = False) -> None:
    """Missing with every missing thing and the commands that get it, in one message. on_paper: unless the run will download all of them."""
    wants = missing(cfg)
    if wants and not (on_paper and all(FROM_HUB in want for want in wants)):
        raise Missing.of(wants)


def unfetched(features: str) -> str | None:
    """The address that these features must be downloaded from before they can be tried; None where they lie on disk."""
    url = INCEPTION_URL if features == "inception" else features.partition(":")[2]
    return url if is_url(url) and not cached_path(url).is_file() else None


class OnPaper(NamedTuple):
    """Nets without numbers, and which student has which classes; None where there is one student, and for prompts."""

    teacher: Denoiser
    method: Method
    partition: Partition | None
    empty: list[int]  # classes that no image shows
    marks: Marks  # of the inputs that are there


def check_on_paper(cfg: Config, images: Images | None, folder: Path, ranks: Ranks) -> OnPaper:
    """The run of these settings on these images, None where there are none or not yet. UserError for what cannot be."""
    check_images(cfg, images, ranks.count)
    teacher = teacher_on_paper(cfg, images, folder, ranks)
    trained = all(not p.is_meta for p in teacher.parameters())
    if not cfg.teacher.checkpoint or origins.is_there(cfg.teacher.checkpoint):  # of a stand-in nothing can be said
        check_told(cfg, teacher, images)
    check_lora(cfg.lora, cfg.train.parallel if ranks.count > 1 else "ddp")
    marks = ranks.agree(ranks.on_first(lambda: marks_of(cfg, images, teacher if trained else None, text=teacher.text))) or {}
    check_inputs(folder, marks)
    if teacher.text:
        check_caches(cfg, images, folder)
        check_prompts(cfg, images, folder)
    with torch.device("meta"):
        teacher = teacher.to("meta")
        teacher.lora_of_copies = cfg.lora if cfg.lora.rank and not to_come(cfg) else None
        students = cfg.students.net
        start = build.student_net(students, teacher) if students else None
        method = cfg.method.build(teacher, start or teacher)
    build.check_lighten(method, cfg.skipping)
    check_optimizers(cfg, method)
    check_begins(cfg, method)
    if not cfg.data.path and cfg.method.needs().data:
        raise UserError(f"method {cfg.method.name} looks at real images: set data.path")
    if not cfg.data.path and students:
        raise UserError("students.net is trained on real images first: set data.path")
    complete = images is not None or not cfg.data.path or without_data(cfg)  # else which classes there are is not known yet
    known = complete and not to_come(cfg) and not teacher.text
    partition = partition_of(cfg, teacher.label_dim, images) if known else None
    if (earlier := earlier_place(cfg, cfg.student or 0)) and is_earlier(earlier) and not missing(cfg):
        earlier_weights(method, earlier)
        check_same_part(earlier, partition)
    return OnPaper(teacher, method, partition, classes_without_images(images, teacher.label_dim), marks)


def check_images(cfg: Config, images: Images | None, ranks: int) -> None:
    """UserError where there are too few images for anything."""
    if not cfg.data.path and not cfg.teacher.checkpoint:
        raise UserError("data.path=null wants teacher.checkpoint=FILE.safetensors: a teacher cannot be trained without data")
    if images is not None and len(images) < 2:
        raise UserError(f"{images.name} has 1 image, a run wants at least 2: it ends with a distance between distributions")
    if images is not None and len(images) < ranks:
        raise UserError(f"{ranks} ranks want as many images, {images.name} has {len(images)}: start fewer")


def teacher_on_paper(cfg: Config, images: Images | None, folder: Path, ranks: Ranks) -> Denoiser:
    """The net of the file that is given or that was trained in `folder` before; else a new one, as large as the images.

    A pipeline that is still on the hub says nothing of its net: one of EDM's, which knows classes, shows what the method makes of it.
    """
    given = cfg.teacher.checkpoint
    file = local_path(given) if given else folder / "teacher.safetensors"
    if ranks.agree(ranks.on_first(lambda: is_pipeline(file) or (file.is_file() and (bool(given) or is_whole(file))))):
        teacher = build.load_teacher(file, images, cfg.teacher, planned=True)
        build.own_plan(cfg.skipping, teacher)
        build.taught_sampler(file)
        return teacher
    if not given and cfg.skipping.plan:
        raise UserError(
            f"skipping.plan={cfg.skipping.plan} was made for one teacher, and this run would train another: give teacher.checkpoint=FILE, or "
            "train the teacher first and probe it (potstill probe)"
        )
    size = build.rehearsal_size(cfg) if images is None or to_come(cfg) else (images.resolution, images.channels, images.label_dim)
    with torch.device("meta"):
        teacher = build.build_net(cfg.net, *size) if given or images is None else build.fresh_teacher(cfg, images)
    return build.with_guide(teacher, cfg.teacher)
