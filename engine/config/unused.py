"""Settings that were given and do nothing in this run, said once before it begins.

A setting is given where it differs from the schema's default. Which of them do nothing is known in two places: a settings
dataclass says it of its own (`unused()`), and `across` of what follows from elsewhere: a teacher's file, the data, the ranks.
"""

import dataclasses
import inspect
from os.path import commonprefix

from potstill.engine.common.checks import Unused
from potstill.engine.config.chosen import chosen
from potstill.engine.config.schema import Config, NetConfig, flat
from potstill.engine.models.origins import to_come
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.edm import SCHEMES
from potstill.engine.nets.edm_denoiser import EDMDenoiser


def sentence(cfg: Config, teacher: Denoiser, ranks: int = 1) -> str:
    """All of them with their reasons, in one sentence; "" where there are none."""
    rules = across(cfg, teacher, ranks)
    if teacher.text:  # else by the captions of the data
        cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, prompts=cfg.text.prompts or cfg.data.path))
    for branch in ("data", "method", "students", "skipping", "lora", "text", "eval"):
        rules |= {f"{branch}.{name}": why for name, why in getattr(cfg, branch).unused().items()}
    names: dict[str, list[str]] = {}
    for name in given(cfg):
        if why := next((why for rule, why in rules.items() if name == rule or name.startswith(f"{rule}.")), None):
            names.setdefault(why, []).append(name)
    names = {why: short(found) for why, found in names.items()}
    parts = [f"{', '.join(found)} ({why})" for why, found in names.items()]
    return f"these settings do nothing here: {'; '.join(parts)}" if parts else ""


def short(names: list[str]) -> list[str]:
    """Of more than three in teacher.train, say, what their names have in common, and how many they are."""
    branches: dict[str, list[str]] = {}
    for name in names:
        branches.setdefault(".".join(name.split(".")[:2]), []).append(name)
    return [
        one
        for branch in branches.values()
        for one in ([f"{commonprefix(branch).rpartition('.')[0]}.… ({len(branch)} settings)"] if len(branch) > 3 else branch)  # noqa: RUF071 (cut at a dot)
    ]


def given(cfg: Config) -> list[str]:
    """The dotted names of the settings that differ from the schema's defaults."""
    return [name for one in chosen(cfg, Config(method=type(cfg.method)())) for name in flat(one.value, one.name)]


def across(cfg: Config, teacher: Denoiser, ranks: int) -> Unused:
    """What one branch of the settings, the teacher's file or the number of ranks makes of another; names may be whole branches."""
    rules: Unused = {}
    if (file := cfg.teacher.checkpoint) is not None:
        why = f"teacher.checkpoint={file}"
        rules |= dict.fromkeys([f"net.{name}" for name in contradicted(cfg, teacher)], f"the net in {file} is another")
        rules |= dict.fromkeys(("teacher.train", "teacher.loss.P_mean", "teacher.loss.P_std"), why)
    if not isinstance(teacher, DiffusersDenoiser) and not (file and to_come(file)):
        rules |= dict.fromkeys(
            ("teacher.precision", "teacher.size", "teacher.embedded_guidance"), "the teacher is no pipeline of diffusers"
        )
        if teacher.img_channels in (1, 3):
            rules["teacher.vae"] = "the teacher's samples are pictures"
    elif isinstance(teacher, DiffusersDenoiser) and not teacher.config.get("guidance_embeds"):
        rules["teacher.embedded_guidance"] = f"{teacher.name} is told no scale of guidance"
    if getattr(cfg.method, "guidance", 1.0) == 1.0:
        rules["teacher.guide"] = "method.guidance=1" if hasattr(cfg.method, "guidance") else f"method {cfg.method.name} has no guidance"
    if isinstance(teacher, DiffusersDenoiser):
        rules["teacher.vae"] = "a pipeline has its own"
    if cfg.train.kimg <= (joins := getattr(cfg.method, "gan_after", 0.0)):
        rules |= dict.fromkeys(("method.gan_student", "method.gan_share"), f"train.kimg={cfg.train.kimg:g}: method.gan_after={joins:g}")
    if not teacher.text:
        rules["teacher.loss.prompt_dropout"] = rules["text.encoder"] = "the teacher is told no prompts"
    elif file is not None:
        rules["text.encoder"] = f"teacher.checkpoint={file}"
    if file is None:
        ours = isinstance(teacher, EDMDenoiser)
        if ours and teacher.precond == "EDM2Precond":
            rules["net.model_type"] = "net.precond=EDM2Precond"
        others = ("config", "prediction") if ours else set(vars(cfg.net)) - {"model_type", "config", "prediction"}
        rules |= dict.fromkeys((f"net.{name}" for name in others), f"net.model_type={cfg.net.model_type}")
    if "teacher" in cfg.teacher.train.optim:
        rules["teacher.train.optim.student"] = "teacher.train.optim.teacher is given"
    if cfg.students.net is None:
        rules["students.tsm"] = "students.net=null"
    if not cfg.data.path:
        rules["eval.features"] = "data.path=null"
        if not cfg.eval.scores:
            rules |= dict.fromkeys(("eval.n", "eval.seed", "train.eval_kimg"), "data.path=null")
    for name, stage in (("teacher.train", cfg.teacher.train), ("students.tsm", cfg.students.tsm), ("train", cfg.train)):
        if stage.ema_std is not None:
            rules |= dict.fromkeys((f"{name}.ema_kimg", f"{name}.ema_ramp_up"), f"{name}.ema_std={stage.ema_std:g}")
        if not stage.phema:
            rules[f"{name}.phema_kimg"] = f"{name}.phema=[]"
        if ranks == 1:
            rules |= dict.fromkeys((f"{name}.parallel", f"{name}.fsdp"), "one process; torchrun starts several")
        elif stage.parallel != "fsdp":
            rules[f"{name}.fsdp"] = f"{name}.parallel={stage.parallel}"
    return rules


def contradicted(cfg: Config, teacher: Denoiser) -> list[str]:
    """Settings of the net that are not what the teacher's file says of it, as far as it says anything."""
    if isinstance(teacher, DiffusersDenoiser):
        config = {f"config.{name}": value for name, value in (cfg.net.config or {}).items()}
        given = {name: value for name, value in vars(cfg.net).items() if name != "config" and value != getattr(NetConfig(), name)} | config
        known = {f"config.{name}": value for name, value in teacher.config.items()}
        known |= {"model_type": teacher.name, "prediction": teacher.scheme["prediction"]}
        return [name for name, value in given.items() if name not in known or known[name] != value]
    if not isinstance(teacher, EDMDenoiser):
        return [name for name, value in vars(cfg.net).items() if value != getattr(NetConfig(), name)]
    signature = inspect.signature(type(teacher.model)).parameters
    said = {name: one.default for name, one in signature.items()} | SCHEMES[teacher.precond] | teacher.kwargs
    said |= {"precond": teacher.precond, "model_type": type(teacher.model).__name__, "conditional": bool(teacher.label_dim)}
    said = {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}
    return [name for name, value in vars(cfg.net).items() if value is not None and (name not in said or said[name] != value)]
