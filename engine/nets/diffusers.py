"""A denoiser of Hugging Face's diffusers as D(x; σ): a U-Net or transformer of a family that `engine.nets.families` knows.

    x = x₀ + σ n,   D = c_skip·x + c_out·F(c_in·x, time(σ), condition)

                    σ               c_in          c_skip       c_out
    epsilon         √((1-ᾱ)/ᾱ)      1/√(1+σ²)     1            -σ
    v_prediction    same            1/√(1+σ²)     1/(1+σ²)     -σ/√(1+σ²)
    sample          same            1/√(1+σ²)     0            1
    flow            t/(1-t)         1/(1+σ)       1/(1+σ)      -σ/(1+σ)

A state x is always [N, C, H, W] (videos [N, C, T, H, W]), also of nets that take tokens.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.precond import Coefficients
from potstill.engine.diffusion.tables import CAP, flow_level, shift_of, sigmas_of
from potstill.engine.nets import parts, pipelines
from potstill.engine.nets.conditions import Condition, Text, expanded
from potstill.engine.nets.denoiser import Denoiser, per_sample
from potstill.engine.nets.families import family_of
from potstill.engine.nets.lora import ADAPTER
from potstill.engine.nets.taps import depths, tapped

HALVES = (torch.bfloat16, torch.float16)
TEXT = ("embeds", "mask", "pooled")


class DiffusersDenoiser(Denoiser):
    """`model` of diffusers with the `scheme` it was trained by (`engine.diffusion.tables`).

    size: of the latents, (H, W) or (T, H, W); None: what the model's settings or its pipeline say.
    fixed: what is the same in every call, such as {"guidance": 3.5} where the scale of guidance is embedded; None: its pipeline's.
    null: one row, the prompt that guidance leads away from.

    Float32 weights compute in `compute_dtype` by autocast; 16-bit weights, as `from_folder(dtype=…)` loads them, in their own.
    UserError for a class, settings or a size that cannot be.
    """

    table: Tensor  # σ of each timestep, float32, the smallest first; of a flow empty
    null_embeds: Tensor | None
    null_mask: Tensor | None
    null_pooled: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        scheme: Mapping[str, Any],
        *,
        size: tuple[int, ...] | None = None,
        fixed: Mapping[str, float] | None = None,
        null: Text | None = None,
    ):
        super().__init__(model)
        self.name, self.scheme, self.config = type(model).__name__, dict(scheme), dict(cast(Any, model).config)
        self.family = family_of(self.name)
        self.waits = self.family.waits
        self.fixed = dict(self.family.fixed if fixed is None else fixed)
        self.shape = self.family.shape(self.name, self.config, size)
        self.text, self.label_dim = self.family.text, self.config.get(self.family.classes) or 0
        if self.config.get("guidance_embeds") and "guidance" not in self.fixed:
            raise UserError(f'this {self.name} is told a scale of guidance: fix one, such as {{"guidance": 3.5}}')
        for module in model.modules():
            if type(module).__name__ == "LabelEmbedding":  # DiT: in training each block would forget a tenth of the labels
                module.dropout_prob = 0.0  # pyright: ignore[reportArgumentType]
        self.flow = self.scheme["prediction"] == "flow"
        table = torch.empty(0, device="cpu") if self.flow else sigmas_of(self.scheme)
        first = 1 / self.scheme["steps"]
        self.sigma_min, self.sigma_max = (first / (1 - first), CAP) if self.flow else (table[0].item(), table[-1].item())
        self.known_levels = table  # on the host, wherever the net is
        self.register_buffer("table", table.clone(), persistent=False)
        for name in TEXT:
            self.register_buffer(f"null_{name}", None, persistent=False)
        self.extra: tuple[str, ...] = ()
        if null is not None:
            self.null = null
        self.low = self._low()
        self.compute_dtype = self.low or torch.float32

    @property
    def null(self) -> Text | None:
        """The null prompt, one row on the net's device."""
        if self.null_embeds is None:
            return None
        extra = {name: getattr(self, f"null_{name}") for name in self.extra}
        return Text(self.null_embeds, self.null_mask, self.null_pooled, extra)

    @null.setter
    def null(self, text: Text) -> None:
        if len(text) != 1:
            raise UserError(f"the null prompt is one row, got {len(text)}: give one prompt's embedding")
        self.family.check(self.name, self.config, text)
        device = next(self.model.parameters()).device
        text, self.extra = text.to(device), tuple(text.extra)
        for name, t in {"embeds": text.embeds, "mask": text.mask, "pooled": text.pooled, **text.extra}.items():
            self.register_buffer(f"null_{name}", t, persistent=False)

    def levels(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> list[Tensor]:
        """What the first half of the net sees in x: maps [N, C', h, w], of videos [N, C', t, h, w].

        Of a U-Net one of every resolution of its encoder, finest first; of a transformer that of half of its blocks, and before it
        that of a quarter. Nothing after them is computed.
        """
        view, seen = tapped(self.model, self.family)
        told = self._condition(condition, len(x))
        c = self.coefficients(self._sigmas(sigma, x))
        self._run(view, x.float(), c, told)
        return self._maps(seen, told, x) if self.family.stacks else seen

    def taps(self) -> list[tuple[int, int, int]]:
        """UserError for videos."""
        if len(self.shape) != 3:
            raise UserError(f"heads on a net's features want pictures, {self.name} has samples {list(self.shape)}: do without")
        if self.family.stacks:
            height, width = self._tokens(self.shape[1:])
            return [(self.family.channels(self.config), height, width)] * len(depths(self.model, self.family))
        channels = self.config["block_out_channels"]
        return [(c, self.shape[1] >> i, self.shape[2] >> i) for i, c in enumerate(channels)]

    def coefficients(self, sigma: Tensor) -> Coefficients:
        one, total = torch.ones_like(sigma), (1 + sigma**2).sqrt()
        match self.scheme["prediction"]:
            case "epsilon":
                return Coefficients(one, -sigma, 1 / total, self.time(sigma))
            case "v_prediction":
                return Coefficients(1 / total**2, -sigma / total, 1 / total, self.time(sigma))
            case "sample":
                return Coefficients(0 * one, one, 1 / total, self.time(sigma))
        return Coefficients(1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma), self.time(sigma))

    def time(self, sigma: Tensor) -> Tensor:
        """The scheduler's timestep at σ [N], in σ's dtype: the index of the nearest level of a table, of a flow steps·σ/(1+σ).

        CAP stands for pure noise, and is told as that: a hundredth of a timestep less would be another embedding.
        """
        if self.flow:
            return self.scheme["steps"] * torch.where(sigma < CAP, sigma / (1 + sigma), 1.0)
        return self._nearest(sigma).to(sigma.dtype)

    def told(self, sigma: Tensor) -> Tensor:
        """The level nearest to σ that the net can be told, elementwise; to be asked for before noise is added.

        Of a table one of its own. Of a flow σ itself, at most CAP, unless the family rounds t to 16 bits: 25 levels of t in
        0.95 … 0.96 are then 4.
        """
        if not self.flow:
            return self._table(sigma)[self._nearest(sigma)].to(sigma.dtype)
        if self._time_dtype is torch.float32:
            return sigma.clamp(max=CAP)
        return flow_level((sigma / (1 + sigma)).to(self._time_dtype).to(sigma.dtype))

    def round_sigma(self, sigma: float) -> float:
        return self.told(torch.tensor(sigma, dtype=torch.float64, device="cpu")).item()

    def level(self, u: Tensor) -> Tensor:
        """σ at the quantile u in [0, 1] of the law that is uniform over the times that the net can be told; 1 is all noise."""
        if self.flow:
            return self.told(flow_level(0.001 + 0.999 * u))
        return self._table(u)[(u * (len(self.table) - 1)).round().long()].to(u.dtype)

    def sampling_levels(self, steps: int) -> Tensor:
        """Those that the net's own pipeline walks over: even in time from all noise ("trailing"), of a flow with its shift."""
        if self.flow:
            t = torch.linspace(1, 1 / steps, steps, dtype=torch.float64, device="cpu")
            tokens, dynamic = math.prod(self._tokens(self.shape[1:])), isinstance(self.scheme["shift"], Mapping)
            shift = math.exp(self.family.mu(tokens, steps)) if self.family.mu and dynamic else shift_of(self.scheme, tokens)
            return (shift * t / (1 - t)).clamp(max=CAP)
        n = len(self.known_levels)
        return self.known_levels.double()[[round(n - i * n / steps) - 1 for i in range(steps)]]

    @property
    def guidable(self) -> bool:
        """Does it know a null prompt or class? Nets whose scale of guidance is embedded know none."""
        return not self.config.get("guidance_embeds") if self.text else self.family.null_class

    def unconditional(self, condition: Condition) -> Condition:
        """As many rows of the null prompt, or of no class. UserError where the net knows neither."""
        n = len(condition)
        if self.text:
            if (null := self.null) is None:
                raise UserError(
                    f"guidance wants the null prompt of {self.name}, got none: embed it with the prompts, or set guidance to 1 "
                    "(the scale is embedded in nets like Flux, whose pipelines know no null prompt)"
                )
            return expanded(null, n)
        if self.family.null_class:
            return torch.zeros_like(cast(Tensor, condition))
        raise UserError(f"guidance wants a net that was also trained without classes, which {self.name} has no input for: set it to 1")

    def blocks(self) -> list[nn.Module]:
        """The repeated modules, none inside of another: what is sharded, compiled and recomputed one by one."""
        kinds = set(self.family.blocks)  # a sharded one's own class comes after FSDP's
        found = [m for m in self.model.modules() if any(kind.__name__ in kinds for kind in type(m).__mro__)]
        return found[self.family.entered :]

    def recompute(self, mode: str) -> None:
        model = cast(Any, self.model)
        switch = model.enable_gradient_checkpointing if mode == "blocks" else model.disable_gradient_checkpointing
        switch()

    def set_dropout(self, p: float) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Dropout) and ADAPTER not in name:  # whose dropout is a setting of their own
                module.p = p

    def description(self) -> dict[str, Any]:
        """What `from_description` makes the same net of, with other weights: JSON."""
        known = signature(type(self.model).__init__).parameters  # older files have more
        config = {name: value for name, value in self.config.items() if name in known}
        described = {"class": self.name, "config": config, "scheme": self.scheme, "size": self.shape[1:], "fixed": self.fixed}
        return json.loads(json.dumps(described))

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> Self:
        """The net with fresh weights. UserError for a class that is not known, or settings that it does not take."""
        family_of(described["class"])
        kind = getattr(pipelines.diffusers(), described["class"])
        try:
            model = kind.from_config(dict(described["config"]))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(f"{described['class']} cannot be built from these settings: {' '.join(str(error).split()):.300}") from error
        return cls(model, described["scheme"], size=tuple(described["size"]), fixed=described["fixed"])

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        size: tuple[int, ...] | None = None,
        fixed: Mapping[str, float] | None = None,
        planned: bool = False,
    ) -> Self:
        """The denoiser of a pipeline's folder, in eval mode, on the CPU; nothing else of the folder is read, and no pickle.

        dtype: of the weights; None: float32. planned: without a number, on the meta device. UserError for a folder without
        what is needed, or whose weights are not just those of the class.
        """
        name, path, scheme = pipelines.denoiser_in(folder)
        kind, size = getattr(pipelines.diffusers(), name), size or pipelines.sides_in(path)
        if planned:
            model = parts.on_paper(kind, path)
            with torch.device("meta"):
                return cls(model, scheme, size=size, fixed=fixed).eval()
        return cls(parts.loaded(kind, path, dtype or torch.float32), scheme, size=size, fixed=fixed).eval()

    def _low(self) -> torch.dtype | None:
        """The 16 bits of the weights, but for those that the model's class keeps in float32."""
        return next((p.dtype for p in self.model.parameters() if p.dtype in HALVES), None)

    def _apply(self, *arguments: Any, **named: Any) -> Self:
        """Of every `.to`."""
        super()._apply(*arguments, **named)
        self.low = self._low()
        return self

    def _tokens(self, sides: Sequence[int]) -> tuple[int, ...]:
        """How many there are along the sides of a sample: (h, w), of videos (t, h, w)."""
        return tuple(side // patch for side, patch in zip(sides, self.family.patches(self.config), strict=True))

    @property
    def _time_dtype(self) -> torch.dtype:
        """What the net rounds t to."""
        rounds = self.family.rounds_time
        return {"never": None, "16 bit": self.low or self.compute_dtype, "16-bit weights": self.low}[rounds] or torch.float32

    def _table(self, like: Tensor) -> Tensor:
        """The table on the device of a tensor."""
        return self.known_levels if like.device.type == "cpu" else self.table

    def _nearest(self, sigma: Tensor) -> Tensor:
        """The index of the nearest level of the table, by bisection of the middles between levels."""
        table = self._table(sigma)
        return torch.searchsorted((table[1:] + table[:-1]) / 2, sigma.float().contiguous())

    def _raw(self, x: Tensor, sigma: Tensor, condition: Condition | None, **how: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.float()
        c = self.coefficients(self._sigmas(sigma, x))
        raw = self._run(self.model, x, c, self._condition(condition, len(x)))
        return raw[:, : self.shape[0]], x, c.c_skip, c.c_out  # some nets also predict a variance, unused

    def _run(self, model: nn.Module, x: Tensor, c: Coefficients, told: Any) -> Tensor:
        x_in = per_sample(c.c_in, x) * x
        with self._autocast(x.device):
            return self.family.call(model, x_in if self.low is None else x_in.to(self.low), c.c_noise, told, self.fixed)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Float32 weights in `compute_dtype`. No cast is kept: a CUDA graph would replay yesterday's."""
        if self.low or self.compute_dtype is torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self.compute_dtype, cache_enabled=False)

    def _condition(self, condition: Condition | None, n: int) -> Any:
        """What the family's call takes: a Text of n rows, indices of classes [n], or None."""
        if self.text:
            if condition is None and (condition := self.null) is None:
                raise UserError(f"{self.name} wants prompts, got none, and it has no null prompt")
            if not isinstance(condition, Text):
                raise UserError(f"{self.name} wants embedded prompts, got classes: embed prompts by its own text encoder")
            self.family.check(self.name, self.config, condition)
            condition = condition if len(condition) == n else expanded(condition, n)
            return condition.to(dtype=self.low or torch.float32)
        if not self.label_dim:
            return None
        if condition is None and not self.family.null_class:
            raise UserError(f"{self.name} with classes wants one-hot labels, got none, and it has no class for that")
        if condition is None:
            return torch.full((n,), self.label_dim, device=self.table.device)
        classes = cast(Tensor, condition).reshape(-1, self.label_dim).expand(n, -1)
        none = self.label_dim if self.family.null_class else 0
        return torch.where(classes.any(1), classes.argmax(1), none)

    def _maps(self, seen: list[Tensor], told: Any, x: Tensor) -> list[Tensor]:
        """The image's tokens in the states [N, L, C'] of some blocks, as maps."""
        grid = self._tokens(x.shape[2:])
        count = math.prod(grid)
        found = []
        for tokens in seen:
            if self.family.images == "after text":
                lengths = told.embeds.shape[1] if told.mask is None else told.mask.sum(1, keepdim=True)
                places = (lengths + torch.arange(count, device=tokens.device)).expand(len(tokens), -1)
                tokens = tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))
            tokens = tokens[:, :count] if self.family.images == "first" else tokens[:, -count:]
            found.append(tokens.transpose(1, 2).unflatten(2, grid))
        return found
