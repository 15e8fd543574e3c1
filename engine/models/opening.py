"""Opens what a user names, a run folder, a weight file or the pipeline of a teacher: its nets, and how each is sampled."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import SafeLoader, YAMLError

from potstill.engine.common.errors import Damaged, UserError, reading
from potstill.engine.common.kinds import DICT, FLAG, TEXT, check, count, number, optional
from potstill.engine.common.reading import read_json
from potstill.engine.diffusion.sampling import CHURNED, Sampler, heun, ode
from potstill.engine.diffusion.solvers import SOLVERS
from potstill.engine.models.descriptions import SIZE, check_described
from potstill.engine.models.origins import OWN, is_pipeline, load_origin, local_path
from potstill.engine.models.partitions import Partition
from potstill.engine.models.router import MANIFEST, Router, load_router, student_name
from potstill.engine.models.weights import load_net, read_metadata
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.guide import led_by
from potstill.engine.readers.harmless import check_text
from potstill.kernels import cuda

STUDENT, TEACHER = "student", "teacher"
ROLES = (STUDENT, TEACHER)
WEIGHTS = "model.safetensors"  # in a folder as the Hugging Face hub expects it, beside config.json
MOST_LEVELS = 10_000  # of a file's own walk; EDM's longest has 256
ADVICE = "copy the file again, or mend it"
PLACE = "place.json"  # in a run folder: {"folder": …}, where the relative paths in its settings begin
PATHS = (
    ("teacher", "checkpoint"),
    ("teacher", "guide"),
    ("teacher", "vae"),
    ("data", "path"),
    ("text", "prompts"),
    ("text", "cache"),
)  # settings that may be such
SECTIONS = {
    name: optional(DICT) for name in ("teacher", "data", "eval", "method", "text")
}  # of config.yaml, as far as others than a run read it
SETTINGS = {
    "teacher": {
        "checkpoint": optional(TEXT),
        "guide": optional(TEXT),
        "precision": optional(TEXT),
        "size": optional(SIZE),
        "embedded_guidance": optional(number()),
        "vae": optional(TEXT),
    },
    "method": {"guidance": optional(number())},
    "text": {"prompts": optional(TEXT), "cache": optional(TEXT), "precision": optional(TEXT), "max_length": optional(count(1))},
    "data": {"path": optional(TEXT), "resolution": optional(count(1)), "unlabelled": optional(FLAG)},
    "eval": {"features": optional(TEXT), "n": optional(count(0)), "seed": optional(count(0)), "batch": optional(count(0))},
}
EDM_SIGMAS = (0.002, 80.0)  # 2206.00364, Table 1


@dataclass
class Model:
    """A net in eval mode on its device, how it is sampled, and the metadata of its file."""

    role: str
    path: Path
    net: Denoiser | Router
    sampler: Sampler
    metadata: dict[str, Any]


def weight_files(where: Path, pipeline: Path | None = None) -> dict[str, Path]:
    """The weight files of a run folder by role (a teacher elsewhere, also a pipeline's folder, is found through the run), or the file itself.

    A file's role, which only its metadata tell, is the key "" here. pipeline: a teacher's, wherever the run says that it is.
    """
    if where.is_file():
        return {"": where}
    if is_pipeline(where):
        return {TEACHER: where}
    if not where.is_dir():
        raise UserError(f"no run folder or weight file at {where}")
    merged, teacher = where / MANIFEST, where / "teacher.safetensors"
    if (exported := where / WEIGHTS).is_file() and not merged.is_file():
        return {"": exported}
    found = {STUDENT: merged if merged.is_file() else where / "student.safetensors"}
    found[TEACHER] = teacher if teacher.is_file() else pipeline or teacher_elsewhere(where) or teacher
    found = {role: path for role, path in found.items() if path.is_file() or is_pipeline(path)}
    if not found:
        raise UserError(
            f"{where} holds neither student.safetensors nor teacher.safetensors: wanted a run folder that "
            "potstill train has finished, a .safetensors file, or the folder of a pipeline of diffusers"
        )
    return found


def teacher_elsewhere(where: Path) -> Path | None:
    """The file or pipeline that the run at `where` (a folder, or a file in one) learnt from, also the pipeline that was made there.

    None where it names none, or there is none by now.
    """
    given = (settings(where).get("teacher") or {}).get("checkpoint")
    path = local_path(given) if given else run_of(where) / OWN
    return path if path.is_file() or is_pipeline(path) else None


def pipeline_named(name: str | Path | None) -> Path | None:
    """What --pipeline names: a folder, or USER/NAME in the hub's cache; None for none. UserError where no pipeline is there."""
    if name is None:
        return None
    if not is_pipeline(path := local_path(str(name))):
        raise UserError(f"no pipeline at {name}: wanted as --pipeline the folder of one of diffusers, with model_index.json in it")
    return path


def run_of(where: Path) -> Path:
    """The folder of the run that this is, or that a weight file lies in, also that of one of several students."""
    folder = where if where.is_dir() else where.parent
    several = folder.parent / MANIFEST
    return folder.parent if where.name == "student.safetensors" and folder.name.startswith("student-") and several.is_file() else folder


def settings(where: Path) -> dict[str, Any]:
    """config.yaml of a run folder, or of the run a weight file lies in; {} where there is none.

    Its relative paths lead to what they led to when the run began, while that is there.
    """
    path = run_of(where) / "config.yaml"
    if not path.is_file():
        return {}
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8")
        check_text(text, SafeLoader, str(path))
        tree = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise Damaged(f"{path} is not readable as YAML: {' '.join(str(error).split()):.200}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} wants to be a mapping of settings, got {type(tree).__name__}")
    check(path, tree, SECTIONS, ADVICE)
    for name, kinds in SETTINGS.items():
        check(path, tree.get(name) or {}, kinds, ADVICE, inside=f"{name}.")
    if (place := path.with_name(PLACE)).is_file():
        found = read_json(place, dict, ADVICE)
        check(place, found, {"folder": optional(TEXT)}, ADVICE)
        _seen_from(Path(found.get("folder") or ""), tree)
    return {str(key): value for key, value in tree.items()}


def _seen_from(folder: Path, tree: dict[Any, Any]) -> None:
    """Make the settings that are relative paths those of what lies in a folder, if it does."""
    for section, name in PATHS:
        said = tree.get(section) or {}
        if (given := said.get(name)) and folder.is_absolute() and (folder / given).exists():
            said[name] = str(folder / given)


def open_models(
    where: Path,
    which: str | None = None,
    *,
    steps: int | None = None,
    solver: str | None = None,
    of_teacher: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    base: Path | None = None,
) -> list[Model]:
    """The nets at `where`, or only the one that is `which`. UserError where there is none such.

    `steps` and `solver` replace the way of sampling that the file names, for the nets that can be sampled so;
    `of_teacher` (steps, solver, churn, guide, guidance) replaces only the teacher's, and wants one to be there. `base`: the pipeline or weights of the
    teacher, which adapters (LoRA) belong to; None: where the run or the file says.
    """
    device = torch.device(device)
    files = weight_files(where, base if base and is_pipeline(base) else None)
    if which == TEACHER and "" in files and base and is_pipeline(base):
        files = {TEACHER: base}
    if which and which not in files and "" not in files:
        raise UserError(_without(where, which, next(iter(files))))
    found = []
    for role, path in files.items():
        if which and role not in (which, ""):
            continue
        if is_pipeline(path):
            found.append(
                _of_pipeline(
                    where, path, (of_teacher or {}) | {k: v for k, v in (("steps", steps), ("solver", solver)) if v is not None}, device
                )
            )
            continue
        net, metadata = load_router(path, base) if path.suffix == ".json" else load_net(path, base)
        if isinstance(net, Router):
            check_shared(path, net)
        role = role or (TEACHER if metadata.get("method", TEACHER) == TEACHER else STUDENT)
        if which and role != which:
            raise UserError(f"{path} is a {role}'s weight file, wanted a {which}'s")
        how: dict[str, Any] = {"steps": steps, "solver": solver} | ((of_teacher or {}) if role == TEACHER else {})
        guide, guidance = how.pop("guide", None), how.pop("guidance", None)
        sampler = sampler_for(role, net, metadata, **how, source=path)
        if role == TEACHER and isinstance(net, Denoiser):
            sampler = replace(sampler, guidance=guided(net, guide, guidance, settings(where)) or sampler.guidance)
        net.to(device).eval()
        found.append(Model(role, path, net, sampler, metadata))
    if of_teacher and all(model.role != TEACHER for model in found):
        raise UserError(f"presets, churn and guidance are for teachers, and {where} holds a student: leave them out")
    return found


def guided(net: Denoiser, guide: str | None, guidance: float | None, recipe: dict[str, Any]) -> float | None:
    """How strongly a teacher is guided, which gets its guide here: as given, else as in the run of these settings where it has one; None
    where nothing says so."""
    if guide is None and guidance is None and (guide := (recipe.get("teacher") or {}).get("guide")):
        if not Path(guide).expanduser().is_file():
            raise UserError(f"no file at {guide}, the guide of this run's teacher: put it back, or name it with --guide and --guidance")
        guidance = (recipe.get("method") or {}).get("guidance")
    if guide is not None:
        if guidance is None:
            raise UserError(f"--guide {guide} wants --guidance, how strongly to lead away from it, such as 2")
        led_by(net, load_net(Path(guide).expanduser())[0], guide)
        net.guide.net.to(next(net.parameters()).device)
    if guidance is None:
        return None
    if guidance != 1 and not net.guidable:
        raise UserError(f"--guidance {guidance:g} wants a teacher that knows classes or prompts and none of them, or --guide: set it to 1")
    if not 0 < guidance < float("inf"):
        raise UserError(f"--guidance wants a number above 0, got {guidance:g}")
    return guidance


def check_shared(path: Path, router: Router) -> None:
    """UserError where a manifest shares out what its students are not told."""
    partition = router.partition
    shared = f"{len(partition.student_of)} classes" if isinstance(partition, Partition) else "prompts"
    known = "prompts" if router.text else f"{router.label_dim} classes"
    if shared != known:
        raise UserError(f"{path} shares out {shared}, its students know {known}: make it again")


def _without(where: Path, which: str, there: str) -> str:
    given = (settings(where).get("teacher") or {}).get("checkpoint")
    if which == STUDENT or not given:
        return f"{where} holds no {which}.safetensors, only a {there}'s"
    return f"the teacher of {where} was {given}, which is not there: put it back, or, if it is a pipeline, name its folder with --pipeline"


def _of_pipeline(where: Path, path: Path, how: dict[str, Any], device: torch.device) -> Model:
    """The teacher of a run at `where`, a folder or a student's file, as the run shows it; or of a pipeline alone, with its own settings.

    how: steps, solver, churn and guidance, where they shall be others.
    """
    recipe = settings(where) if where != path else {}
    said, student = recipe.get("teacher") or {}, None
    if where != path:
        student = where if where.is_file() else weight_files(where).get(STUDENT)
    if student and student.name == MANIFEST:
        student = student.parent / student_name(0)
    size, guidance = said.get("size"), said.get("embedded_guidance")
    if student and "diffusers" in (meta := read_metadata(student)):
        check_described(student, meta, 0)
        size, guidance = meta["diffusers"]["size"], meta["diffusers"]["fixed"].get("guidance")
    low = said.get("precision") == "bf16" or (
        said.get("precision", "auto") == "auto" and recipe.get("precision", "auto") != "fp32" and device.type == "cuda"
    )
    net = load_origin(path, dtype=torch.bfloat16 if low else None, size=tuple(size) if size else None, guidance=guidance)
    steps, solver, churn = how.get("steps"), how.get("solver"), how.get("churn")
    _check_walk(steps, solver)
    walk = heun(net, steps or _steps_of(said, path) or _default_steps(net))
    guides = isinstance(net, DiffusersDenoiser) and net.guidable
    if how.get("guide"):
        raise UserError(f"--guide is for nets of EDM's and EDM2's, and {path} is a pipeline of diffusers: use --guidance alone")
    asked = how.get("guidance")
    if asked is not None and (not guides or not 0 < asked < float("inf")):
        raise UserError(f"--guidance wants a number above 0 and a pipeline that knows what to lead away from, got {asked:g} for {path}")
    scale = (recipe.get("method") or {}).get("guidance") if guides and asked is None else asked
    metadata = {"sampler": replace(walk, solver=solver or walk.solver, guidance=1.0 if scale is None else scale).to_dict()}
    sampler = sampler_for(TEACHER, net, metadata, steps=None, solver=None, churn=churn, source=path)
    return Model(TEACHER, path, net.to(device).eval(), sampler, metadata)


def _steps_of(teacher: dict[str, Any], path: Path) -> int | None:
    """How many steps a run samples its teacher with."""
    loss = teacher.get("loss") or {}
    check(path, {"loss": loss}, {"loss": DICT}, ADVICE, inside="teacher.")
    check(path, loss, {"sampling_steps": optional(count(1, MOST_LEVELS))}, ADVICE, inside="teacher.loss.")
    return loss.get("sampling_steps")


def _default_steps(net: Denoiser | Router) -> int:
    return 18 if net.img_resolution <= 32 else 40  # EDM's for CIFAR-10 and for 64 pixels


def _check_walk(steps: int | None, solver: str | None) -> None:
    if steps is not None and steps < 1:
        raise UserError(f"wanted at least 1 step, got {steps}")
    if solver is not None and solver not in SOLVERS:
        raise UserError(f"solver wants one of {', '.join(SOLVERS)}, got {solver!r}")


def sampler_for(
    role: str,
    net: Denoiser | Router,
    metadata: dict[str, Any],
    *,
    steps: int | None,
    solver: str | None,
    churn: tuple[float, float, float, float] | None = None,
    source: Path,
) -> Sampler:
    """How a net is sampled: as its file says, unless steps or solver are given; a teacher's default is EDM's Heun.

    A student is trained for the noise levels in its file: another number of steps wants the name of an ODE solver too,
    unless the student knows of steps (SFD-v), which are then network evaluations.
    """
    _check_walk(steps, solver)
    own = own_sampler(metadata, source)
    if churn:
        walk = sampler_for(role, net, metadata, steps=steps, solver=solver, source=source)
        if walk.solver not in CHURNED or walk.afs or walk.step_condition is not None:
            raise UserError(f"{source} is sampled by {walk.solver}, churn wants a walk with {' or '.join(CHURNED)}")
        lift, low, high, noise = churn
        return replace(walk, churn=(lift, low, min(high, walk.levels(net)[0].item()), noise))
    if own and steps is None and solver is None:
        return own
    walks = own is not None and own.solver in SOLVERS
    if role == STUDENT and solver is None:
        if own is None:
            raise UserError(f"{source} does not say how its student is sampled (no 'sampler' in its metadata): name a solver")
        assert steps is not None  # else the file's own way is taken, above
        if walks and own.sigmas[-1] > 0:
            if own.step_condition is None and steps != own.nfe:
                raise UserError(f"{source} was distilled for {own.nfe} evaluations, got {steps}: leave steps out, or name a solver")
            return own.with_nfe(steps)
        if not walks and steps == len(own.sigmas):
            return own
        if not walks:
            raise UserError(
                f"{source} was distilled for {len(own.sigmas)} step{'s' * (len(own.sigmas) > 1)}, got {steps}: "
                "leave steps out, or name a solver to use it as a denoiser"
            )
    count = steps or (len(own.sigmas) - 1 if own and walks else _default_steps(net))
    name = solver or (own.solver if own and walks and role == STUDENT else "heun")
    low, high = (EDM_SIGMAS[0], own.sigmas[0]) if own and walks else EDM_SIGMAS
    walk = ode(name, count, max(low, net.sigma_min), min(high, net.sigma_max))
    return replace(walk, step_condition=own.step_condition if own else None)


def own_sampler(metadata: dict[str, Any], source: Path) -> Sampler | None:
    """How a weight file says that it is sampled, None where it says nothing. UserError for a way that is not known here."""
    found = metadata.get("sampler")
    if found is None:
        return None
    try:
        sampler = Sampler(**found)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source} names a way of sampling that this version does not know: {error!s:.300}") from error
    if len(sampler.sigmas) > MOST_LEVELS:
        raise Damaged(f"{source} is sampled at {len(sampler.sigmas):,} noise levels, wanted at most {MOST_LEVELS:,}: copy it again")
    return sampler


def device_named(name: str) -> torch.device:
    """auto (CUDA where there is one, else the CPU), cpu, cuda or cuda:1. UserError for what this machine lacks, Triton included."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise UserError(f"device wants auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device wants auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"no device {name} here: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda" and (without := cuda.lacking("norm_silu")):
        raise UserError(f"device={name}: {without}")
    return device
