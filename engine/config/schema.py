"""The tree of settings: dataclasses, which are Hydra's schema. The comment beside a setting is what `--dry-run` and the docs say of it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf

from potstill.engine.common.checks import Unused, above, at_least, finite, one_of, probability, seed, wants
from potstill.engine.data.prompts import TextConfig
from potstill.engine.formats.newborn import PREDICTIONS
from potstill.engine.methods.msd import KINDS as PARTITIONS
from potstill.engine.methods.teacher import EDMLoss
from potstill.engine.nets.lora import LoraConfig
from potstill.engine.skipping.plan import SkippingConfig
from potstill.engine.training.loop import LogConfig
from potstill.engine.training.run import TrainConfig

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
