"""The settings of one stage of training, `train` and `teacher.train` of a recipe, and their checks."""

from dataclasses import dataclass, field

from potstill.engine.common.checks import BadSetting, above, at_least, finite, one_of, wants
from potstill.engine.nets.denoiser import CHECKPOINTING
from potstill.engine.training.compile import MODES as COMPILED
from potstill.engine.training.graphs import MODES as GRAPHS
from potstill.engine.training.optim import IMPLEMENTATIONS, OptimConfig
from potstill.engine.training.parallel import MODES as PARALLEL
from potstill.engine.training.parallel import FSDPConfig
from potstill.engine.training.phema import LIMIT, is_std

ON_NONFINITE = ("stop", "rollback")


@dataclass
class TrainConfig:
    """How long, how large, how often. One thousand images seen is a kimg; an iteration sees `batch` images."""

    kimg: float = 100.0  # length of the training, in thousands of images
    batch: int = 128  # images per iteration, over all micro-batches and ranks
    micro_batch: int | str | None = None  # images per forward and rank, at most; null: its whole share; auto: what memory allows
    parallel: str = "ddp"  # ddp | fsdp, where there are several ranks (`train.fsdp`)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    optim: dict[str, OptimConfig] = field(default_factory=dict)  # by net; a net without an entry uses "student"'s
    optimizer: str = "auto"  # auto | torch | adam_ema: who computes Adam; the numbers are the same but for rounding
    compile: str = "off"  # off | blocks | net: torch.compile of the U-Nets; minutes of waiting, for long runs
    shadows: bool = True  # 16-bit nets keep a 16-bit copy of their weights, renewed each step: the same bits as casting
    ema_kimg: float = 500.0  # half-life of the average of the weights (EMA), in thousands of images; 0: no average
    ema_ramp_up: float = 0.05  # but at most this share of the images seen so far
    ema_std: float | None = None  # relative length of a power-function average (EDM2) instead, such as 0.1; null: ema_kimg's
    phema: list[float] = field(default_factory=list)  # relative lengths of more averages, such as [0.05,0.1]: `potstill convert phema`
    phema_kimg: float | None = None  # thousands of images between two that are kept of each; null: sixteen over the run
    activation_checkpointing: str = "off"  # off | blocks: compute every block again in backward; a third more work, less memory
    log_iterations: int = 50  # between two log lines
    grid_kimg: float | None = None  # thousands of images between two grids of samples from fixed latents; null: ten over the run
    eval_kimg: float | None = (
        None  # thousands of images between two measurements (`eval`) in the run; null: eight cheap ones of a student; 0: none
    )
    checkpoint_kimg: float | None = None  # thousands of images between two checkpoints; null: ten over the run
    keep: int = 2  # newest checkpoints kept
    on_nonfinite: str = "stop"  # when a number is not finite: stop | rollback (to the last checkpoint, and on without that batch)
    graphs: str = "auto"  # replay every turn as one CUDA graph: auto (where there is CUDA) | on (or stop) | off

    def __post_init__(self):
        finite(self)
        if isinstance(self.micro_batch, str) and self.micro_batch.strip().isdecimal():
            self.micro_batch = int(self.micro_batch)  # recipes are read as text, and this setting may be text
        wants(self, "kimg", self.kimg <= 1e12, "at most 1e12")
        above(self, 0, "kimg", "grid_kimg", "checkpoint_kimg", "phema_kimg")
        at_least(self, 1, "batch", "log_iterations", "keep")
        at_least(self, 0, "ema_kimg", "ema_ramp_up", "eval_kimg")
        wants(self, "ema_std", self.ema_std is None or is_std(self.ema_std), f"a relative length above 0 and below {LIMIT}")
        files = [round(std, 3) for std in self.phema]  # which are named so
        good = all(map(is_std, self.phema)) and len({0.0, *files}) == len(files) + 1
        wants(self, "phema", good, f"relative lengths from 0.001 to below {LIMIT} that differ in their first three decimals")
        micro = self.micro_batch
        wants(self, "micro_batch", not isinstance(micro, str) or micro == "auto", "a number, auto or null")
        if isinstance(micro, int) and (micro < 1 or self.batch % micro):
            raise BadSetting("micro_batch", f"= {micro} does not divide batch = {self.batch}")
        one_of(self, "parallel", PARALLEL)
        one_of(self, "optimizer", IMPLEMENTATIONS)
        one_of(self, "compile", COMPILED)
        one_of(self, "activation_checkpointing", CHECKPOINTING)
        one_of(self, "graphs", GRAPHS)
        one_of(self, "on_nonfinite", ON_NONFINITE)

    @property
    def between_profiles(self) -> float:
        """Thousands of images."""
        return self.phema_kimg or self.kimg / 16

    @property
    def lengths(self) -> list[float]:
        """Of the averages beside the product's own."""
        return [std for std in self.phema if std != self.ema_std]

    def optim_of(self, net: str) -> OptimConfig:
        """The optimiser settings of one net."""
        return self.optim.get(net) or self.optim.get("student") or OptimConfig()
