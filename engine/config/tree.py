"""The tree of settings: dataclasses that are Hydra's schema, and how a recipe and `key=value`s become one of them.

A key that does not exist is an error that names the nearest one that does.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from potstill.engine.common.checks import BadSetting, Unused, above, at_least, finite, one_of, probability, seed, wants
from potstill.engine.common.errors import UserError
from potstill.engine.config.library import RECIPES, find, groups_of, names, of_method
from potstill.engine.config.written import Recipes, as_written, kinds
from potstill.engine.data.prompts import TextConfig
from potstill.engine.formats.newborn import PREDICTIONS
from potstill.engine.methods.msd import KINDS as PARTITIONS
from potstill.engine.methods.table import METHODS
from potstill.engine.methods.teacher import EDMLoss
from potstill.engine.nets.lora import LoraConfig
from potstill.engine.readers.harmless import check_references
from potstill.engine.skipping.plan import SkippingConfig
from potstill.engine.training.loop import LogConfig
from potstill.engine.training.run import TrainConfig

#: Branches that a recipe may leave out, which Hydra's overrides can then not reach into: another net, an optimiser of its own.
ABSENT = re.compile(r"\+{0,2}(students\.net|net\.config|(teacher\.train|students\.tsm|train)\.optim\.[^.=]+)(\.[^=]*=|=\{)")
OPTIMISER = re.compile(r"\+{0,2}train\.optim\.([^.=]+)")
METHOD = re.compile(r"method=(\w+)")  # the choice of one
NOT_IN = re.compile(r"Key '\w+' not in '\w+'\s+full_key: (\S+)")
MOST_IMAGES = 10_000_000  # of a Frechet distance: their seeds lie in memory


@dataclass
class DataConfig:
    """The real images; they also say resolution, channels and number of classes."""

    path: str | None = (
        "digits"  # digits | scenes (of digits, with captions) | EDM zip | folder | .npz | .tar shards | hf:NAME | synthetic:64x3; null: none (data-free)
    )
    resolution: int | None = None  # wanted; null: as it comes
    channels: int | None = None  # wanted, of latents; null: as they come
    unlabelled: bool = False  # ignore class labels and class folders
    flips: bool = False  # mirror half of the images
    captions: str | None = (
        None  # .txt or .jsonl, one an image or one a class | a text with {} for the class's name; null: those beside the images
    )
    workers: int = 2  # processes that decode images when they do not fit in memory
    how: str = ""  # how to get the data: printed when it is missing

    def __post_init__(self):
        at_least(self, 1, "resolution", "channels")
        at_least(self, 0, "workers")
        wants(self, "path", self.path != "", "a data set, or null for none")
        wants(self, "captions", self.captions != "", "a file, or null for those beside the images")

    def unused(self) -> Unused:
        return (
            {} if self.path else dict.fromkeys(("resolution", "channels", "unlabelled", "flips", "captions", "workers"), "data.path=null")
        )


@dataclass
class NetConfig:
    """EDM's and EDM2's keyword arguments; null leaves their default. Size, channels and classes come from the data.

    A class of diffusers takes `config` instead.
    """

    precond: str = "EDMPrecond"  # preconditioning: EDMPrecond | VPPrecond | VEPrecond | iDDPMPrecond | GDDPrecond | ECMPrecond; EDM2Precond (EDM2's net)
    model_type: str = "SongUNet"  # SongUNet (DDPM++, NCSN++) | DhariwalUNet (ADM) | PixArtTransformer2DModel, which is told prompts
    config: dict[str, Any] | None = None  # settings of a class of diffusers by its own names; null: its defaults
    prediction: str = "v_prediction"  # of a class of diffusers: v_prediction | epsilon (on DDPM's table) | flow
    conditional: bool = True  # on the class, where the data has classes
    model_channels: int | None = None  # channels that channel_mult multiplies
    channel_mult: list[int] | None = None  # channels of each resolution, the finest first, in units of model_channels
    channel_mult_emb: int | None = None  # channels of the embedding of noise level and class, in units of model_channels
    channel_mult_noise: int | None = None  # channels of the noise level's own embedding, in units of model_channels; SongUNet's
    num_blocks: int | None = None  # residual blocks for each resolution
    attn_resolutions: list[int] | None = None  # side lengths in pixels at which there is attention
    dropout: float | None = None  # probability within the blocks
    label_dropout: float | None = None  # probability that a class is not told, for guidance
    augment_dim: int | None = None  # inputs for EDM's augmentation, which this engine does not do: as the weights to be loaded want it
    embedding_type: str | None = None  # of the noise level: positional (DDPM++) | fourier (NCSN++); SongUNet's
    encoder_type: str | None = None  # standard (DDPM++) | residual (NCSN++) | skip; SongUNet's
    decoder_type: str | None = None  # standard | skip; SongUNet's
    resample_filter: list[int] | None = None  # of changes of resolution: [1,1] (DDPM++) | [1,3,3,1] (NCSN++); SongUNet's and EDM2's
    label_balance: float | None = None  # share of the class in the embedding, beside the noise level; EDM2's, as all below
    concat_balance: float | None = None  # share of the encoder's outputs where the decoder reads them
    res_balance: float | None = None  # share of a residual block's branch
    attn_balance: float | None = None  # share of attention's branch
    channels_per_head: int | None = None  # of attention
    clip_act: float | None = None  # the largest activation that leaves a block
    logvar_channels: int | None = None  # of the head that learns the log-variance of the error

    def __post_init__(self):
        finite(self)
        at_least(self, 1, "model_channels", "channel_mult_emb", "channel_mult_noise", "num_blocks", "channels_per_head", "logvar_channels")
        at_least(self, 0, "augment_dim")
        above(self, 0, "clip_act")
        probability(self, "dropout", "label_dropout", "label_balance", "concat_balance", "res_balance", "attn_balance")
        if self.config:  # of no type that the schema knows: words are what YAML takes them for
            self.config = {name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in self.config.items()}
        one_of(self, "prediction", PREDICTIONS)
        channels, taps = self.channel_mult, self.resample_filter
        wants(self, "channel_mult", channels is None or min(channels, default=0) >= 1, "a list of numbers from 1, one a resolution")
        wants(self, "resample_filter", taps is None or sum(taps) > 0, "a list of numbers whose sum is above 0")


@dataclass
class TeacherConfig:
    """A weight file or a pipeline of diffusers to start from, or how to train one."""

    checkpoint: str | None = None  # .safetensors | a pipeline: folder or USER/NAME; null: train it, or take the one in the run folder
    precision: str = "auto"  # of a pipeline's weights: fp32 | bf16 | auto (bf16 on GPUs where the U-Nets are); trained nets are float32
    size: list[int] | None = None  # of a pipeline's latents, [H, W]; null: the data's, or what the pipeline says
    embedded_guidance: float | None = None  # of nets that are told a scale of guidance (FLUX-dev); null: their pipelines' own
    guide: str | None = None  # .safetensors of a worse net: method.guidance leads away from it (autoguidance); null: from no class
    vae: str | None = None  # of EDM2's latents, for pictures and distances: FOLDER | USER/NAME of the hub; null: three channels are shown
    how: str = ""  # how to get the checkpoint: printed when it is missing
    loss: EDMLoss = field(default_factory=EDMLoss)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        wants(self, "guide", self.guide != "", "a weight file, or null for none")
        wants(self, "checkpoint", self.checkpoint != "", "a weight file or pipeline, or null to train a teacher")
        wants(self, "vae", self.vae != "", "the folder or name of a VAE, or null")
        one_of(self, "precision", ("auto", "fp32", "bf16"))
        good = self.size is None or (len(self.size) in (2, 3) and min(self.size) > 0)
        wants(self, "size", good, "height and width of latents (before them, frames), or null")
        finite(self)
        at_least(self, 0, "embedded_guidance")


@dataclass
class EvalConfig:
    """The Frechet distance, and scores, at the end of a run and, with train.eval_kimg, within it."""

    features: str = "pixels"  # pixels | inception[:FILE|URL] | dinov2:FILE | clip:FILE | a TorchScript file
    scores: list[str] = field(
        default_factory=list
    )  # of nets of prompts: clip:FOLDER | pickscore:FOLDER | aesthetic:HEAD.safetensors:FOLDER | scenes
    n: int | None = None  # images generated; null: as many as the data has, or without data prompts, at most 50,000
    held_out: str | None = None  # other prompts, scored apart: .txt | .jsonl | scenes (its pairs that no picture shows); null: none
    batch: int = 512  # images at a time; changes no image
    seed: int = 0  # of the first image; the next one has the next

    def __post_init__(self):
        at_least(self, 2, "n")
        wants(self, "n", self.n is None or self.n <= MOST_IMAGES, f"at most {MOST_IMAGES:,} images")
        at_least(self, 1, "batch")
        seed(self, "seed")
        wants(self, "features", self.features != "", "the name or file of a feature net, such as pixels")
        wants(self, "held_out", self.held_out != "", "a file of prompts, or null for none")

    def unused(self) -> Unused:
        return {} if self.scores else {"held_out": "eval.scores=[]"}


@dataclass
class StudentsConfig:
    """Multi-student distillation (MSD): every student has its own share of the classes or prompts."""

    count: int = 1  # how many
    partition: str = (
        "blocks"  # of classes: blocks | random | kmeans (of their mean images); of prompts: kmeans | quadrants (2 or 4 equal shares)
    )
    net: NetConfig | None = None  # students of another shape than the teacher's: they learn its scores first (TSM)
    tsm: TrainConfig = field(default_factory=TrainConfig)
    start: str | None = (
        None  # a finished run to go on from: students and fake nets (ADM after DM); SiDA: its student alone, or a weight file
    )

    def __post_init__(self):
        at_least(self, 1, "count")
        one_of(self, "partition", PARTITIONS)
        wants(self, "count", self.partition != "quadrants" or self.count in (1, 2, 4), "2 or 4 where students.partition=quadrants")
        wants(self, "start", self.start != "", "a run or a weight file, or null for none")

    def unused(self) -> Unused:
        return {"partition": "students.count=1"} if self.count == 1 else {}


@dataclass
class Config:
    """What holds for the whole run."""

    run_dir: str | None = None  # where everything is written; null: runs/<name of the recipe>
    seed: int = 0  # of every random number: weights, order of the images, noise
    device: str = "auto"  # auto (a GPU where there is one) | cpu | cuda | cuda:1
    precision: str = "auto"  # of the U-Nets: auto | fp32 | bf16; weights and losses are always float32
    tf32: bool | None = None  # float32 convolutions and products on GPUs with 10-bit mantissas; null: PyTorch's (convolutions)
    cudnn_benchmark: bool | None = None  # cuDNN times its convolutions on every new shape; null: on GPUs, unless deterministic
    deterministic: bool = False  # only algorithms that give the same bits every time; slower on GPUs
    rehearse: bool = False  # random weights, synthetic images, a few iterations: speed and memory of this recipe here
    max_hours: float | None = None  # of this call: then it saves and ends with code 142, and the same command goes on; null: no limit
    profile: bool = False  # write a trace and a table of some iterations of every stage into the run folder
    data: DataConfig = field(default_factory=DataConfig)
    net: NetConfig = field(default_factory=NetConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    method: Any = MISSING  # which one, by name: method=sid; its own settings are method.…
    students: StudentsConfig = field(default_factory=StudentsConfig)
    student: int | None = None  # of several students train this one only, as a job of its own; null: all in turn
    train: TrainConfig = field(default_factory=TrainConfig)
    skipping: SkippingConfig = field(default_factory=SkippingConfig)
    text: TextConfig = field(default_factory=TextConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        finite(self)
        seed(self, "seed")
        above(self, 0, "max_hours")
        wants(self, "student", self.student is None or 0 <= self.student < self.students.count, f"0 … {self.students.count - 1}")


class _Groups(SearchPathPlugin):
    """Lets a recipe anywhere on disk use our groups (method=…, net=…), and keeps its words as they are written."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for place in search_path.get_path():
            if place.provider == "main" and "://" not in place.path:
                place.path = f"{Recipes.scheme()}://{place.path}"
        search_path.append("potstill", f"{Recipes.scheme()}://{RECIPES}")


for plugin in (_Groups, Recipes):
    Plugins.instance().register(plugin)


def load(recipe: str | Path, overrides: list[str]) -> Config:
    """The settings of a recipe, by name or path, with `key=value` overrides. UserError for whatever does not fit the schema."""
    recipe = find(recipe)
    for override in overrides:
        if "=" not in override:
            raise UserError(f"wanted key=value, got {override!r}; e.g. train.batch=64")
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, node in METHODS.items():
        store.store(group="method", name=f"{name}_schema", node=node)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(recipe.resolve().parent), version_base="1.3"):
        try:
            written = [as_written(one, _kind) for one in overrides]
            within, absent = ([one for one in written if bool(ABSENT.match(one)) is far] for far in (False, True))
            tree, other = _tree(recipe, within)
            OmegaConf.set_struct(tree, False)  # new names among the optimisers; dataclasses stay closed
            tree.merge_with(*map(_nested, absent))
            check_references(OmegaConf.to_container(tree, resolve=False), recipe.name)
            if unknown := list(_unknown(tree)):
                raise UserError(_no_such_setting(unknown[0], recipe, overrides))
            config = OmegaConf.to_object(tree)
        except BadSetting as error:
            raise error.at(_place(tree)) from None
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_sentence(error, recipe, overrides)) from error
        except YAMLError as error:
            raise UserError(f"{recipe} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, Config):
        raise UserError(f"{recipe} is no recipe: its defaults list must begin with 'schema'")
    if type(config.method) not in METHODS.values():
        raise UserError(
            f"method wants one of {', '.join(sorted(p.stem for p in (RECIPES / 'method').glob('*.yaml')))}, got {config.method!r:.60}"
        )
    named = {found[1] for one in absent if (found := OPTIMISER.match(one))}
    for net in set(config.train.optim) - {"student", *config.method.needs().nets} - named if other else ():
        del config.train.optim[net]
    config.run_dir = config.run_dir or f"runs/{recipe.stem}"
    return config


def defaults_under(method: str) -> Config:
    """All settings as they are where nothing is set but the method, once some recipe has been loaded."""
    with initialize_config_dir(str(RECIPES), version_base="1.3"):
        config = OmegaConf.to_object(_composed(RECIPES / "schema.yaml", [f"+method={method}"]))
    assert isinstance(config, Config)
    return config


def other_method(recipe: Path, overrides: list[str]) -> str:
    """The method that an override chooses in place of the recipe's own; "" where none does. UserError for one that there is not."""
    chosen = [found[1] for one in overrides if (found := METHOD.fullmatch(one))]
    if len(chosen) > 1:
        raise UserError(f"wanted one method, got {' and '.join(chosen)}")
    own = groups_of(recipe).get("method") if chosen else None
    if own is None or own == chosen[-1]:
        return ""
    known = sorted({path.stem for folder in (recipe.parent, RECIPES) for path in (folder / "method").glob("*.yaml")})
    if chosen[-1].lower() == "msd":
        raise UserError(
            f"{recipe.name}: MSD is several students of any method: students.count=2 students.partition=blocks, without method=msd"
        )
    if chosen[-1] not in known:
        near = difflib.get_close_matches(chosen[-1].lower(), known, 2, 0.6)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{recipe.name}: there is no method {chosen[-1]!r} to take; {hint}wanted one of {', '.join(known)}")
    return chosen[-1]


def notes_of_method(recipe: str | Path, overrides: list[str]) -> tuple[str, str]:
    """What to say where the method is not the recipe's own, and the command whose recipe is made for it; "" and "" for neither."""
    recipe = find(recipe)
    if not (method := other_method(recipe, overrides)):
        return "", ""
    own = of_method(recipe, method)
    better = f"potstill train {own.stem if own.parent == RECIPES else own}" if own else ""
    note = f"note: method={method} begins with its own defaults, and takes all else from {recipe.stem}, where it was chosen for {groups_of(recipe)['method']}"
    return f"{note}; made for it is: {better}" if better else note, better


def _tree(recipe: Path, overrides: list[str]) -> tuple[DictConfig, str]:
    """A recipe with overrides, and which other method than its own they choose, "" for none: that one begins with its own defaults, and what
    the recipe says of its own method's settings is left out.
    """
    if not any(map(METHOD.fullmatch, overrides)):
        return _composed(recipe, overrides), ""
    theirs = [one for one in overrides if METHOD.fullmatch(one) or one.lstrip("+").startswith("method.")]
    tree = _composed(recipe, [one for one in overrides if one not in theirs])  # which a recipe that is none does not survive
    if not (method := other_method(recipe, overrides)):
        return _composed(recipe, overrides), ""
    tree.method = _composed(recipe.with_name("schema.yaml"), [f"+{one}" if METHOD.fullmatch(one) else one for one in theirs]).method
    return tree, method


def _composed(recipe: Path, overrides: list[str]) -> DictConfig:
    """What Hydra makes of recipe and overrides. It stumbles over some input in ways of its own, which are the user's to mend too."""
    try:
        return compose(recipe.stem, overrides=overrides)
    except UserError:
        raise
    except MissingConfigException as error:  # an OSError too
        raise UserError(_sentence(error, recipe, overrides)) from error
    except (OSError, ValueError, TypeError, AssertionError, AttributeError, RecursionError) as error:
        given = f" with {' '.join(overrides)}" if overrides else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Hydra cannot compose {recipe}{given}: {reason}; wanted a recipe as in {RECIPES}, and key=value of settings"
        ) from error


def _unknown(tree: DictConfig, path: str = "") -> Iterator[str]:
    """Names within dataclasses that these do not have: `+key=value` can add some."""
    kind = OmegaConf.get_type(tree)
    for name in tree:
        if dataclasses.is_dataclass(kind) and name not in {f.name for f in dataclasses.fields(kind)}:
            yield f"{path}{name}"
        elif not OmegaConf.is_missing(tree, name) and isinstance(tree[name], DictConfig):
            yield from _unknown(tree[name], f"{path}{name}.")


def _place(tree: DictConfig) -> str:
    """The dotted name of the innermost branch whose own check fails."""
    for name in tree:
        branch = tree[name] if not OmegaConf.is_missing(tree, name) else None
        if not isinstance(branch, DictConfig):
            continue
        try:
            OmegaConf.to_object(branch)
        except BadSetting:
            inner = _place(branch)
            return f"{name}.{inner}" if inner else str(name)
    return ""


def _nested(override: str) -> dict[str, Any]:
    """{"a": {"b": value}} of a.b=value."""
    parsed = OverridesParser.create().parse_override(override)
    tree: Any = parsed.value()
    for name in reversed(parsed.key_or_group.split(".")):
        tree = {name: tree}
    return tree


def _kinds() -> Iterator[tuple[str, Any]]:
    """The names and types of all settings, those of every method included."""
    yield from kinds(Config).items()
    for node in METHODS.values():
        yield from ((f"method.{name}", kind) for name, kind in kinds(node).items())


def _kind(key: str) -> Any:
    """The type of a setting; None where there is none of this name."""
    return next((kind for name, kind in _kinds() if fnmatchcase(key, name)), None)


def to_yaml(config: Config) -> str:
    """The resolved settings, as they are stored in a run folder."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dictionary as {"a.b.c": value}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _sentence(error: Exception, recipe: Path, overrides: list[str]) -> str:
    """What went wrong, from the innermost of Hydra's nested errors."""
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        known = [one for one in error.options or ["schema", *names()] if not one.endswith("_schema")]
        return f"{recipe.name}: there is no {group or 'recipe'} {name!r} to take; {_near(name, known)}"
    if isinstance(error, OverrideParseException):
        return " ".join(str(error).split())
    if isinstance(error, ConfigCompositionException) and (found := NOT_IN.search(str(error))):  # a line of the recipe's own
        return _no_such_setting(found[1], recipe, overrides)
    inner: BaseException = error
    while isinstance(inner.__cause__, HydraException | OmegaConfBaseException):
        inner = inner.__cause__
    key = getattr(inner, "full_key", None)
    message = str(inner).splitlines()[0]
    unknown = isinstance(inner, AttributeError | KeyError) or "not in" in message
    if key and unknown:
        return _no_such_setting(key, recipe, overrides)
    if isinstance(error, ConfigCompositionException) and not key:
        return " ".join(str(error).split())
    return f"{recipe.name}: {key}: {message}" if key else f"{recipe.name}: {message}"


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 2, 0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"wanted one of {', '.join(known)}"


def _no_such_setting(key: str, recipe: Path, overrides: list[str]) -> str:
    try:
        known = list(flat(OmegaConf.to_container(_tree(recipe, [one for one in overrides if METHOD.fullmatch(one)])[0])))
        known += sorted({key.rpartition(".")[0] for key in known} - {""})
    except (HydraException, OmegaConfBaseException, UserError):  # a recipe that does not compose does not say which method's they are
        known = [name for name, _ in _kinds()]
    if key in known:
        return f"{recipe.name} sets {key}, which this method does not have; wanted a recipe of this method (`potstill recipes`), or a copy without it"
    leaf = key.rpartition(".")[2]
    begun = [one for one in known if len(leaf) > 3 and one.rpartition(".")[2].startswith(leaf)]
    near = difflib.get_close_matches(key, known, 1, 0.8) or begun or difflib.get_close_matches(key, known, 1, 0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{recipe.name}: there is no setting {key!r}{hint}"
